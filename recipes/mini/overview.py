"""How the embedded model learns overviews: blocks are added to it, and it is taught by its own dense answers.

A coarse token covers several cells of the picture. Which part of it an output token needs, it can tell only from where
the two lie to each other, so attention has to look at the covering token by heads that tell the parts apart: one for
each of the 4 x 4 cells that an overview by 4 covers, the inner four of which serve an overview by 2. The model's own
heads are taken, so new blocks bring new ones. They add nothing to what the model says until they are trained.

What is trained is the model with its LoRA for dropped tokens, whose first blocks stay as they are. The result lies
beside the model, for whoever asks for an overview: all others have the model without it.

What to do with what is found is learned from a teacher: the base as it was, which sees *all* tokens of the picture that
overview and sharp tokens hold (the enlarged overview, with sharp cells where there are sharp tokens). Its answer has no
noise, and no detail in it that cannot be known. The new blocks learn to write into an output token what the teacher's
copying heads write there; for the first steps they learn that alone, which is half the work. The output tokens then
follow the teacher block by block.

Every batch of encoded scenes is taken with several sets of tokens: some of them (plain dropping), an overview alone, an
overview and sharp tokens.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from sparse_context.families.host import flat
from sparse_context.pipelines.embedded import OVERVIEW
from sparse_context.pipelines.load import load
from sparse_context.pipelines.lora_file import NO_LORA
from sparse_context.pipelines.overview_blocks import FIRST, NEW, grown, load_blocks
from sparse_context.pipelines.spec import ModelSpec
from sparse_context.training.checkpoints import has_begun, start_from
from sparse_context.training.data import Ahead
from sparse_context.training.loop import LoopConfig, train
from sparse_context.training.loss import noise_levels
from sparse_context.training.optimisers import drawn_from, make_optimisers
from sparse_context.training.precision import has_fast_bfloat16

from . import teaching
from .attention import speed_up
from .base import IN_TURN, batch_number
from .data import load_assets
from .loss import TOWARDS_NOISE, encode_text, position_ids, text_ids
from .model import encode_pictures
from .overview_looks import (
    COPYING,
    READING,
    find_sources,
    follow_loss,
    looking_loss,
    reading_loss,
    watched_blocks,
    watched_copies,
)
from .overview_sets import (
    Batch,
    OverviewConfig,
    TokenSet,
    aligned,
    composites,
    draw_set,
    grids_of,
    make_batch,
    reference_tokens,
)
from .run_folder import autocast, check_config, default_device, save_config, to_unit
from .teaching import watched_heads


class Encoded(NamedTuple):
    """A batch as the steps take it. pictures: (B, 3, H, W) in [-1, 1], targets and then references; latents: of each,
    (B, C, rows, columns); text: (B, 32, 128)."""

    batch: Batch
    pictures: list[torch.Tensor]
    latents: list[torch.Tensor]
    text: torch.Tensor


class Forward(NamedTuple):
    """The velocity on the output tokens, what the watched blocks made of them, and what the watched heads added."""

    velocity: torch.Tensor
    states: list[torch.Tensor]
    copies: list[torch.Tensor]


@torch.no_grad()
def encode(vae: nn.Module, text_encoder: nn.Module, batch: Batch) -> Encoded:
    """Pictures and prompts of a batch through the frozen encoders."""
    device = vae.device
    with autocast(device):
        pictures = [to_unit(same.to(device)).contiguous(memory_format=torch.channels_last) for same in batch.pictures]
        latents = [encode_pictures(vae, same).float() for same in pictures]
        text = encode_text(text_encoder, batch.ids.to(device), batch.attends.to(device))
    return Encoded(batch, pictures, latents, text)


def run_forward(
    transformer: Any,
    noisy: torch.Tensor,
    sigma: torch.Tensor,
    text: torch.Tensor,
    references: torch.Tensor,
    ids: torch.Tensor,
    blocks: Sequence[int],
    heads: Sequence[tuple[int, int]] = (),
) -> Forward:
    """One forward of the transformer. ids: of output and reference tokens. blocks: the single blocks to watch. heads:
    those whose additions to watch."""
    shown = slice(text.shape[1], text.shape[1] + noisy.shape[1])
    with watched_blocks(transformer, blocks, shown) as states, watched_copies(transformer, heads, shown) as copies:
        velocity = transformer(
            hidden_states=torch.cat([noisy, references], 1),
            encoder_hidden_states=text,
            timestep=sigma,
            img_ids=ids.to(noisy.device),
            txt_ids=text_ids(text.shape[1]).float().to(noisy.device),
            return_dict=False,
        )[0]
    return Forward(velocity[:, : noisy.shape[1]].float(), states, copies)


class OverviewLoss:
    """`loss(step)` of the run. encoded: `encoded(number)` gives a batch. base, dropper: the two teachers."""

    def __init__(
        self,
        config: OverviewConfig,
        encoded: Callable[[int], Encoded],
        vae: nn.Module,
        student: Any,
        base: Any,
        dropper: Any,
    ) -> None:
        self.config, self.encoded, self.vae = config, encoded, vae
        self.student, self.base, self.dropper = student, base, dropper
        self.reader = first_blocks(student, FIRST + NEW)
        self.copier = first_blocks(base, max(block for block, _ in teaching.COPYING) + 1)
        self.behind = range(FIRST, base.config.num_single_layers)

    def __call__(self, step: int) -> torch.Tensor:
        config = self.config
        encoded = self.encoded(batch_number(step, config.subsets))
        reads = step < config.reading and all(map(aligned, encoded.batch.scenes))  # and does nothing else
        tokens = draw_set(config, encoded.batch.scenes, [config.seed, 3, step], overviews_alone=reads)
        sigma, noisy = self._add_noise(encoded.latents[0], step)
        rows, columns = encoded.latents[0].shape[-2:]
        output_ids, grids = position_ids(rows, columns, 0).float(), grids_of(encoded.latents[1:])
        heads = self._taught_heads(step, reads) if tokens.factor else []
        student = self.reader if reads else self.student
        watched = [FIRST - 1, FIRST + NEW - 1] + [number + NEW for number in self.behind] * (not reads)
        with autocast(noisy.device):
            wanted = self._ask_teacher(encoded, tokens, sigma, noisy, output_ids, reads)
            with torch.no_grad():
                references, ids = reference_tokens(self.vae, encoded.pictures[1:], encoded.latents[1:], tokens)
            ids = torch.cat([output_ids, ids])
            with watched_heads(student, heads) as pairs:
                answer = run_forward(student, noisy, sigma, encoded.text, references, ids, watched)
            loss = torch.zeros((), device=noisy.device)
            if not reads:
                weights = 1 + config.focus * encoded.batch.focus.to(noisy.device)
                if tokens.factor:
                    places = find_sources(encoded.batch.source, grids, tokens)
                    weights = weights + config.sharp * (places.sharp >= 0).to(noisy.device)
                error = (answer.velocity - wanted.velocity).square().mean(-1)
                loss = (error * weights).sum() / weights.sum()
                loss = loss + config.follow * follow_loss(answer.states[2:], wanted.states, weights)
            if tokens.factor:
                length = encoded.text.shape[1]
                rotary = student.pos_embed(torch.cat([text_ids(length).float(), ids]))
                source = encoded.batch.source
                looks = looking_loss(heads, pairs, rotary, source, grids, tokens, length)
                added = answer.states[1].float() - answer.states[0].float()
                blurred = find_sources(source, grids, tokens).blurred
                loss = loss + config.teach * looks + config.read * reading_loss(added, wanted.copies, blurred)
        return loss

    def _taught_heads(self, step: int, reads: bool) -> list[tuple[int, int]]:
        """Those that are told in this step where to look: a few, for each costs as much as a tenth of a block."""
        heads = [place for place, _ in READING] + list(COPYING) * (not reads)
        rng = np.random.default_rng([self.config.seed, 4, step])
        return [heads[i] for i in sorted(rng.choice(len(heads), self.config.taught, replace=False))]

    def _add_noise(self, latents: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise levels (B,), and the output tokens at them."""
        clean = flat(latents)
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + step)
        u = torch.rand(len(clean), generator=generator).clamp(1e-4, 1 - 1e-4)
        sigma = noise_levels(u, "none", TOWARDS_NOISE).to(clean.device)
        noise = torch.randn(clean.shape, generator=generator).to(clean.device)
        return sigma, torch.lerp(clean, noise, sigma.view(-1, 1, 1))

    @torch.no_grad()
    def _ask_teacher(
        self,
        encoded: Encoded,
        tokens: TokenSet,
        sigma: torch.Tensor,
        noisy: torch.Tensor,
        output_ids: torch.Tensor,
        reads: bool,
    ) -> Forward:
        """What the base says of all tokens of what the set holds. Of plain dropping: what it says with its LoRA of an
        edit, whose dropped tokens cannot be known, and of all tokens of a subject."""
        _, *latents = encoded.latents
        teacher = self.copier if reads else self.base
        if tokens.kind == "plain" and all(map(aligned, encoded.batch.scenes)):
            teacher = self.dropper
            references, ids = reference_tokens(self.vae, encoded.pictures[1:], latents, tokens)
        else:
            if tokens.factor:
                held = composites(self.vae, encoded.pictures[1:], grids_of(latents), tokens)
                latents = [
                    encode_pictures(self.vae, seen.contiguous(memory_format=torch.channels_last)).float()
                    for seen in held
                ]
            references = torch.cat([flat(part) for part in latents], 1)
            ids = torch.cat([position_ids(*part.shape[-2:], 10 * (i + 1)).float() for i, part in enumerate(latents)])
        ids = torch.cat([output_ids, ids])
        behind = () if reads else self.behind
        heads = teaching.COPYING if tokens.factor else ()
        return run_forward(teacher, noisy, sigma, encoded.text, references, ids, behind, heads)


def first_blocks(transformer: Any, count: int) -> Any:
    """A transformer of the first `count` single blocks of this one, which are this one's own modules."""
    with torch.device("meta"):
        short = type(transformer).from_config(dict(transformer.config) | {"num_single_layers": count})
    for name, part in transformer.named_children():
        setattr(short, name, part[:count] if name == "single_transformer_blocks" else part)
    return short.eval()


def overview_optimisers(student: Any, config: OverviewConfig) -> list[torch.optim.Optimizer]:
    """Those of the new blocks at the config's rates, and those of the old blocks behind them at a share of these."""
    fresh = tuple(f"single_transformer_blocks.{number}." for number in range(FIRST, FIRST + NEW))
    trained = {name: weight for name, weight in student.named_parameters() if weight.requires_grad}
    optimisers: list[torch.optim.Optimizer] = []
    for is_new, share in ((True, 1.0), (False, config.old)):
        part = {n.replace(".", "/"): w for n, w in trained.items() if n.startswith(fresh) == is_new}
        optimisers += make_optimisers(nn.ParameterDict(part), ("single",), share * config.lr, share * config.muon_lr)
    return optimisers


def train_overview(
    folder: Path,
    config: OverviewConfig,
    name: str = "overview",
    stop_after: float | None = None,
    workers: int = 0,
    by_the_clock: bool = False,
) -> None:
    """Train, or continue, the run `folder/name`, from what earlier runs learned (`overview_export`), or where that is
    not there from the package's base and its LoRA.

    workers, stop_after: as in `train_base`. by_the_clock: whether learning rates decay so that they end
    there. Raises ValueError where a run of another config is in the folder.
    """
    check_config(folder / name, config)
    assets = load_assets(folder / "assets.safetensors").split("train")
    device = default_device()
    pipe = load(ModelSpec(dtype="float32", device=str(device), lora=NO_LORA))
    dropper = load(ModelSpec(dtype="float32", device=str(device))).transformer
    base = pipe.transformer
    with drawn_from(config.seed):
        student = grown(dropper)
    student.to(device)
    pipe.vae.to(memory_format=torch.channels_last)
    if has_fast_bfloat16(device):
        for part in (base, dropper, pipe.text_encoder):  # autocast would cast frozen weights in every step
            part.to(torch.bfloat16)
    for part in (pipe.vae, pipe.text_encoder, base, dropper, student):
        part.eval().requires_grad_(False)
    student.single_transformer_blocks[FIRST:].requires_grad_(True)
    if device.type == "cpu":
        for transformer in (base, dropper, student):
            speed_up(transformer)
    batches = Ahead(partial(make_batch, assets, config, pipe.tokenizer), workers)

    @lru_cache(maxsize=IN_TURN)
    def encoded(number: int) -> Encoded:
        return encode(pipe.vae, pipe.text_encoder, batches(number))

    loss = OverviewLoss(config, encoded, pipe.vae, student, base, dropper)
    if not has_begun(folder / name):
        if OVERVIEW.is_file():
            load_blocks(student, OVERVIEW)
        start_from(student, folder / name)
    save_config(folder / name, config)
    train(
        student,
        overview_optimisers(student, config),
        loss,
        folder / name,
        LoopConfig(
            steps=config.steps,
            warmup=config.warmup,
            save_every=100,
            ema=config.ema,
            stop_after=None if by_the_clock else stop_after,
            seconds=stop_after if by_the_clock else None,
        ),
    )
