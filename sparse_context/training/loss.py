"""The loss: flow matching on the output tokens, with dropped reference tokens."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from ..families.host import Host, Looks
from ..overview import Overview
from ..tokens import ReferenceTokens
from .attention import MatmulAttention
from .batch import Autocast, Encoded, Encoding, Prepared, TokenSet, encode, kept_tokens, prepare_batch, shown_tokens
from .config import TrainConfig
from .data import Ahead, Example
from .dropping import draw_selection
from .processes import Processes
from .teaching import looking_loss, wanted_tokens


def noise_levels(u: torch.Tensor, scheme: str, shift: float) -> torch.Tensor:
    """Noise levels in (0, 1) from uniform numbers `u` in (0, 1): the quantiles of `scheme`, moved towards noise.

    "logit_normal" is the sigmoid of a standard normal (Esser et al. 2024), "none" is uniform. A `shift` of s moves
    sigma to s * sigma / (1 + (s - 1) * sigma), as the flow matching scheduler does.
    """
    sigma = torch.sigmoid(torch.special.ndtri(u)) if scheme == "logit_normal" else u
    return shift * sigma / (1 + (shift - 1) * sigma)


def add_noise(host: Host, encoded: Encoded, sigma: torch.Tensor, noise: torch.Tensor) -> ReferenceTokens:
    """The output tokens at the noise levels `sigma`, (B,)."""
    level = sigma.view(-1, 1, 1, 1)
    return host.target_tokens((1 - level) * encoded.target + level * noise)


@torch.no_grad()
def dense_answer(host: Host, encoded: Encoded, sigma: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """What the model without the adapter says with all reference tokens: the teacher's velocity (B, tokens, C)."""
    noisy = add_noise(host, encoded, sigma, noise)
    with without_adapter(host.transformer):
        references = host.reference_tokens(encoded.references)
        return host.velocity(noisy, sigma, encoded.text, references, teacher=True).float()


def flow_matching_loss(
    host: Host,
    encoded: Encoded,
    index: np.ndarray,
    sigma: torch.Tensor,
    noise: torch.Tensor,
    distillation: float = 0.0,
    focus: float = 0.0,
    preservation: float = 0.0,
    into: np.ndarray | None = None,
    teacher: torch.Tensor | None = None,
    unseen: float = 1.0,
    overviews: Mapping[int, Overview] | None = None,
) -> torch.Tensor:
    """Mean squared error of the velocity on the output tokens, with the reference tokens at `index` and no others but
    those of `overviews`.

    sigma: (B,). noise: as `encoded.target`. into: as in `ReferenceTokens.keep`. overviews: by the number of their
    reference; `encoded` has them. The velocity to be met is noise - target; a share `distillation` of the loss meets
    the dense prediction without the adapter instead. A token counts 1 + `focus` * its `encoded.mask` times, and
    `unseen` times that if it has an `encoded.source` of which nothing is kept, not even an overview. With a
    `preservation` above 0, which is for an `index` of all tokens, the loss is that times the mean squared distance to
    the dense prediction without the adapter, in which all tokens count the same. teacher: that prediction, from
    `dense_answer`, where it is there already.
    """
    if teacher is None and (distillation or preservation):
        teacher = dense_answer(host, encoded, sigma, noise)
    tokens = TokenSet(index, into, overviews or {})
    kept = kept_tokens(host, encoded, tokens)
    velocity = host.velocity(add_noise(host, encoded, sigma, noise), sigma, encoded.text, kept).float()
    if teacher is not None and preservation:
        return preservation * (velocity - teacher).square().mean()
    weights = 1 + focus * encoded.mask
    if unseen < 1:  # else no copy to the device, which would wait for it
        present = torch.from_numpy(shown_tokens(encoded, tokens)).to(encoded.source.device)
        seen = (encoded.source < 0) | torch.isin(encoded.source, present)
        weights = weights * torch.where(seen, 1.0, unseen)
    wanted = host.target_tokens(noise - encoded.target).latents
    error = (velocity - wanted).square().mean(-1)
    if teacher is not None and distillation:
        error = (1 - distillation) * error + distillation * (velocity - teacher).square().mean(-1)
    return (error * weights).sum() / weights.sum()


@contextlib.contextmanager
def without_adapter(transformer: Any) -> Iterator[None]:
    """The transformer as it was before the adapter."""
    transformer.disable_adapters()
    try:
        yield
    finally:
        transformer.enable_adapters()


class Drawn(NamedTuple):
    """What is drawn for a batch, ahead of its steps: the batch, a set of tokens each subset, and the noise's seed."""

    batch: Prepared
    subsets: list[TokenSet]
    seed: int


@dataclass(frozen=True)
class Noised:
    """An encoded batch with its noise, and what the teacher says of it (None where nobody asks). total: its tokens of
    references. teaches: whether it says where heads are to look."""

    number: int
    encoded: Encoded
    subsets: list[TokenSet]
    total: int
    teaches: bool
    sigma: torch.Tensor
    noise: torch.Tensor
    teacher: torch.Tensor | None


class FlowMatching:
    """The loss of a run, for loop.py: a call with `number` gives that of one set of tokens of one batch.

    Each batch is taken `config.subsets` times in a row: call n is of subset n % subsets of batch n // subsets, which is
    batch `processes.number` of the data. All that is random is drawn from (seed, that number), and the sets from the
    subset as well. So processes draw different ratios, sets and noise, and together those that one alone would. What
    needs no encoder is made ahead, in a thread or by processes; what the encoders and the teacher say of a batch is
    kept until the next one.
    """

    def __init__(
        self,
        host: Host,
        batches: Callable[[int], list[Example]],
        config: TrainConfig,
        *,
        processes: Processes | None = None,
        encoding: Encoding | None = None,
        autocast: Autocast = contextlib.nullcontext,
    ) -> None:
        """processes: one without it. encoding: caches and workers, none without it. autocast: around each forward,
        and around encoders whose weights are float32."""
        self.host, self.batches, self.config, self.autocast = host, batches, config, autocast
        self.processes = processes or Processes()
        self.encoding = encoding or Encoding()
        self.device = next(host.transformer.parameters()).device
        self.shift = host.shift if config.shift is None else config.shift
        self.fused_attention = config.gradient_checkpointing or config.compile or self.device.type != "cpu"
        self._ahead = Ahead(self._draw, self.encoding.workers)
        self._current: Noised | None = None

    def __call__(self, number: int) -> torch.Tensor:
        number, subset = divmod(number, self.config.subsets)
        if self._current is None or self._current.number != number:
            self._current = self._noised(number)
        batch = self._current
        tokens = batch.subsets[subset]
        preservation = self._preservation(tokens, batch.total)
        heads = self.config.heads if batch.teaches and not preservation else []
        with self._forward(), self.host.watch_heads(heads) if heads else contextlib.nullcontext() as looks:
            loss = flow_matching_loss(
                self.host,
                batch.encoded,
                tokens.index,
                batch.sigma,
                batch.noise,
                self.config.distillation,
                self.config.focus,
                preservation,
                into=tokens.into,
                teacher=batch.teacher,
                unseen=self.config.unseen,
                overviews=tokens.overviews,
            )
            if looks is not None:
                loss = loss + self.config.teach * self._looking(looks, batch.encoded, tokens)
        return loss

    @property
    def current(self) -> Encoded:
        """The batch of the last call."""
        assert self._current is not None
        return self._current.encoded

    def _looking(self, looks: Looks, encoded: Encoded, kept: TokenSet) -> torch.Tensor:
        """How far the taught heads are from looking where they should, with a set of tokens."""
        source, grids = encoded.source, encoded.grids
        count = len(kept.index) + sum(overview.tokens for overview in kept.overviews.values())
        return looking_loss(looks(source.shape[1], count), source, wanted_tokens(source, grids, kept))

    def _draw(self, number: int) -> Drawn:
        """A batch before any encoder saw it, and which tokens it keeps; in a thread or process ahead of the steps."""
        config, number = self.config, self.processes.number(number)
        examples = self.batches(number)
        rng = np.random.default_rng([config.seed, 2, number, 0])
        emptied = rng.random(len(examples)) < config.caption_dropout
        prompts = ["" if empty else example.prompt for empty, example in zip(emptied, examples, strict=True)]
        batch = prepare_batch(self.host, examples, prompts)
        seed = [config.seed, 3, number, 0]
        seeds = [seed, *([*seed, subset] for subset in range(1, config.subsets))]  # the first is as without others
        grids = batch.grids(self.host.token)
        selections = [draw_selection(config.dropping, batch.pictures, grids, seed) for seed in seeds]
        subsets = [TokenSet.of(selection) for selection in selections]
        return Drawn(batch._replace(pictures=[]), subsets, int(rng.integers(2**62)))

    def _noised(self, number: int) -> Noised:
        batch, subsets, seed = self._ahead(number)
        overviews = {(i, each.factor): None for tokens in subsets for i, each in tokens.overviews.items()}
        latent_cache, text_cache = self.encoding.latent_cache, self.encoding.text_cache
        encoded = encode(self.host, batch, latent_cache, text_cache, overviews, self.autocast)
        generator = torch.Generator().manual_seed(seed)
        u = torch.rand(len(encoded.target), generator=generator).clamp(1e-4, 1 - 1e-4)
        sigma = noise_levels(u, self.config.weighting_scheme, self.shift).to(self.device)
        noise = torch.randn(encoded.target.shape, generator=generator).to(self.device)
        total = sum(rows * columns for rows, columns in batch.grids(self.host.token))
        teacher = None
        asked = bool(self.config.distillation) or any(self._preservation(tokens, total) for tokens in subsets)
        if self.processes.sharded:  # the weights come together for all or for none
            asked = self.processes.any(asked)
        if asked:
            with self._forward():
                teacher = dense_answer(self.host, encoded, sigma, noise)
        teaches = bool((batch.source >= 0).any())  # here, for it is on the CPU
        return Noised(number, encoded, subsets, total, teaches, sigma, noise, teacher)

    def _preservation(self, tokens: TokenSet, total: int) -> float:
        """The config's, for a set that keeps all tokens; others are not held to the dense prediction alone."""
        return self.config.preservation if len(tokens.index) == total else 0.0

    @contextlib.contextmanager
    def _forward(self) -> Iterator[None]:
        with self.autocast(), contextlib.nullcontext() if self.fused_attention else MatmulAttention():
            yield
