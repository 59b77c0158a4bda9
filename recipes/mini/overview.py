"""How the embedded base learns overviews: three blocks are added to it, and it is taught by its own dense answers.

A coarse token covers several cells of the picture. Which part of it an output token needs, it can tell only from where
the two lie to each other, so attention has to look at the covering token by heads that tell the parts apart. The base's
own heads are taken, so new blocks bring new ones: they add nothing to what the base says until they are trained, and
the base's weights before them stay as they are. Eight heads are taught where to look: one for each quarter of a coarse
token, and one for each of its four outer edges; together they tell a factor of 2 and of 4.

What to do with what is found is learned from a teacher: the base as it was, which sees *all* tokens of the picture that
overview and sharp tokens hold (the enlarged overview, with sharp cells where there are sharp tokens). Its answer has no
noise, and no detail in it that cannot be known. The output tokens follow it block by block.

Every batch of encoded scenes is taken with several sets of tokens: all of them (dense), some (plain dropping, whose
teacher is the base with its LoRA for dropped tokens), an overview alone, an overview and sharp tokens.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from sparse_context.families.host import flat
from sparse_context.overview import overview_grid
from sparse_context.pipelines.load import load
from sparse_context.pipelines.lora_file import NO_LORA
from sparse_context.pipelines.spec import ModelSpec
from sparse_context.training.checkpoints import has_begun, start_from
from sparse_context.training.data import Ahead
from sparse_context.training.loop import LoopConfig, train
from sparse_context.training.loss import noise_levels
from sparse_context.training.optimisers import drawn_from, make_optimisers

from . import teaching
from .attention import speed_up
from .base import IN_TURN, batch_number
from .data import load_assets
from .loss import TOWARDS_NOISE, encode_text, position_ids, text_ids
from .model import encode_pictures
from .overview_sets import (
    Batch,
    OverviewConfig,
    TokenSet,
    aligned,
    composite,
    draw_set,
    make_batch,
    reference_tokens,
)
from .run_folder import check_config, default_device, save_config, to_unit
from .teaching import attention_scores, watched_heads

NEW = 3  # blocks that are added
FIRST = 4  # single block before which they come
COPYING = tuple((block + NEW, head) for block, head in teaching.COPYING)
EDGES = tuple(((FIRST, head), edge) for head, edge in enumerate(((0, -1), (0, 1), (1, -1), (1, 1))))
"""Heads (single block, head) and the edge of a coarse token that each is for: (axis, side)."""
QUARTERS = tuple(((FIRST + 1, head), sides) for head, sides in enumerate(((-1, -1), (-1, 1), (1, -1), (1, 1))))
"""The same for its quarters: (side of the rows, side of the columns)."""


# Where heads look -----------------------------------------------------------------------------------------------------


def looking_loss(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
    rotary: tuple[torch.Tensor, torch.Tensor],
    source: torch.Tensor,
    grid: tuple[int, int],
    tokens: TokenSet,
    text_tokens: int,
) -> torch.Tensor:
    """Cross-entropy of where the heads of `EDGES`, `QUARTERS` and `COPYING` look, in this order.

    source: int64 (B, output tokens), the token of a reference with `grid` that each shows, -1 for none. A copying head
    is to look at a source that is sharp. A head of a quarter is to look at the overview token that covers a source that
    is not, if it lies in that quarter of it; that of an edge, if it lies in the outermost row or column there (for a
    factor of 4 and more). Else they are to look at no reference.
    """
    place = torch.full((grid[0] * grid[1] + 1,), -1)
    place[torch.from_numpy(tokens.kept)] = torch.arange(len(tokens.kept))
    sharp = place[source]  # -1 for none, too: the last entry
    factor = max(tokens.factor, 1)
    row, column = source.div(grid[1], rounding_mode="floor"), source % grid[1]
    cover = len(tokens.kept) + row // factor * overview_grid(grid, factor)[1] + column // factor
    offset = [axis % factor - (factor - 1) / 2 for axis in (row, column)]
    blurred = (source >= 0) & (sharp < 0) & (tokens.factor > 0)
    outer = (factor - 1) / 2
    looks = [blurred & (offset[axis] == side * outer) & (outer > 1) for _, (axis, side) in EDGES]
    looks += [blurred & (offset[0] * up > 0) & (offset[1] * left > 0) for _, (up, left) in QUARTERS]
    wanted = [torch.where(each, cover, -1) for each in looks] + [sharp] * len(COPYING)
    losses = [look_loss(*pair, rotary, where, text_tokens) for pair, where in zip(pairs, wanted, strict=True)]
    return torch.stack(losses).mean()


def look_loss(
    query: torch.Tensor, key: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], wanted: torch.Tensor, text: int
) -> torch.Tensor:
    """Cross-entropy of where one head looks: each output token at the reference token `wanted`, int64 (B, output
    tokens), or where that is -1 at none. The two kinds weigh the same. query, key: (B, tokens, d) before RoPE."""
    first = text + wanted.shape[1]  # token of the references
    scores = attention_scores(query, key, rotary, slice(text, first))
    total, seen = scores.logsumexp(-1), wanted >= 0
    found = scores.gather(-1, (wanted.clamp(min=0) + first).clamp(max=scores.shape[-1] - 1).unsqueeze(-1)).squeeze(-1)
    bare = scores[..., :first].logsumexp(-1)
    losses = ((total - found) * seen).sum() / seen.sum().clamp(min=1)
    return losses + ((total - bare) * ~seen).sum() / (~seen).sum().clamp(min=1)


@contextlib.contextmanager
def watched_blocks(transformer: Any, blocks: Sequence[int], tokens: slice) -> Iterator[list[torch.Tensor]]:
    """Within, a forward pass leaves what these single blocks return in the list, of `tokens` alone."""
    seen: list[torch.Tensor] = []
    with contextlib.ExitStack() as hooks:
        for number in blocks:
            block = transformer.single_transformer_blocks[number]
            handle = block.register_forward_hook(lambda module, inputs, result: seen.append(result[:, tokens]))
            hooks.callback(handle.remove)
        yield seen


# Training -------------------------------------------------------------------------------------------------------------


def grown(base: Any) -> Any:
    """A copy of the transformer with `NEW` single blocks before block `FIRST`, which add nothing yet."""
    config = dict(base.config) | {"num_single_layers": base.config.num_single_layers + NEW}
    student = type(base).from_config(config)
    state = {}
    for name, tensor in base.state_dict().items():
        head, _, rest = name.partition("single_transformer_blocks.")
        if rest and not head:
            number, _, part = rest.partition(".")
            moved = int(number) + NEW * (int(number) >= FIRST)
            name = f"single_transformer_blocks.{moved}.{part}"
        state[name] = tensor
    for number in range(FIRST, FIRST + NEW):
        block = student.single_transformer_blocks[number]
        nn.init.zeros_(block.attn.to_out.weight)
        state |= {f"single_transformer_blocks.{number}.{name}": t for name, t in block.state_dict().items()}
    student.load_state_dict(state)
    return student


def follow_loss(states: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """The mean over blocks of the squared distance of output tokens, as a share of the teacher's own square."""
    parts = []
    for state, target in zip(states, wanted, strict=True):
        error = (state.float() - target.float()).square().mean(-1)
        parts.append((error * weights).sum() / weights.sum() / target.float().square().mean())
    return torch.stack(parts).mean()


class Encoded(NamedTuple):
    """A batch as the steps take it. pictures: (B, 3, H, W) in [-1, 1], targets and then references; latents: of each,
    (B, C, rows, columns); text: (B, 32, 128)."""

    batch: Batch
    pictures: list[torch.Tensor]
    latents: list[torch.Tensor]
    text: torch.Tensor


class Forward(NamedTuple):
    """The velocity on the output tokens, and what the watched blocks made of them."""

    velocity: torch.Tensor
    states: list[torch.Tensor]


@torch.no_grad()
def encode(vae: nn.Module, text_encoder: nn.Module, batch: Batch) -> Encoded:
    """Pictures and prompts of a batch through the frozen encoders."""
    device = vae.device
    with torch.autocast(device.type, torch.bfloat16):
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
) -> Forward:
    """One forward of the transformer. ids: of output and reference tokens. blocks: the single blocks to watch."""
    with watched_blocks(transformer, blocks, slice(text.shape[1], text.shape[1] + noisy.shape[1])) as states:
        velocity = transformer(
            hidden_states=torch.cat([noisy, references], 1),
            encoder_hidden_states=text,
            timestep=sigma,
            img_ids=ids.to(noisy.device),
            txt_ids=text_ids(text.shape[1]).float().to(noisy.device),
            return_dict=False,
        )[0]
    return Forward(velocity[:, : noisy.shape[1]].float(), states)


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
        self.blocks = range(FIRST, base.config.num_single_layers)

    def __call__(self, step: int) -> torch.Tensor:
        config = self.config
        encoded = self.encoded(batch_number(step, config.subsets))
        tokens = draw_set(config, encoded.batch.scenes, [config.seed, 3, step])
        sigma, noisy = self._add_noise(encoded.latents[0], step)
        rows, columns = encoded.latents[0].shape[-2:]
        output_ids = position_ids(rows, columns, 0).float()
        heads = [place for place, _ in EDGES] + [place for place, _ in QUARTERS] + list(COPYING)
        with torch.autocast(noisy.device.type, torch.bfloat16):
            wanted = self._ask_teacher(encoded, tokens, sigma, noisy, output_ids)
            with torch.no_grad():
                references, ids = reference_tokens(self.vae, encoded.pictures[1:], encoded.latents[1:], tokens)
            ids = torch.cat([output_ids, ids])
            with watched_heads(self.student, heads) as pairs:
                moved = [number + NEW for number in self.blocks]
                answer = run_forward(self.student, noisy, sigma, encoded.text, references, ids, moved)
            weights = 1 + config.focus * encoded.batch.focus.to(noisy.device)
            error = (answer.velocity - wanted.velocity).square().mean(-1)
            loss = (error * weights).sum() / weights.sum()
            loss = loss + config.follow * follow_loss(answer.states, wanted.states, weights)
            if tokens.kind == "dense":
                return config.preserve * loss
            if all(map(aligned, encoded.batch.scenes)):
                length = encoded.text.shape[1]
                rotary = self.student.pos_embed(torch.cat([text_ids(length).float(), ids]))
                looks = looking_loss(pairs, rotary, encoded.batch.source, (rows, columns), tokens, length)
                loss = loss + config.teach * looks
        return loss

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
    ) -> Forward:
        """What the base says of all tokens of what the set holds; of dropped tokens, what it says with its LoRA."""
        _, *latents = encoded.latents
        teacher = self.base
        if tokens.kind == "plain":
            teacher = self.dropper
            references, ids = reference_tokens(self.vae, encoded.pictures[1:], latents, tokens)
        else:
            if tokens.factor:
                seen = composite(encoded.pictures[1], latents[0].shape[-2:], tokens.factor, tokens.kept)
                latents = [encode_pictures(self.vae, seen.contiguous(memory_format=torch.channels_last)).float()]
            references = torch.cat([flat(part) for part in latents], 1)
            ids = torch.cat([position_ids(*part.shape[-2:], 10 * (i + 1)).float() for i, part in enumerate(latents)])
        return run_forward(teacher, noisy, sigma, encoded.text, references, torch.cat([output_ids, ids]), self.blocks)


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
) -> None:
    """Train, or continue, the run `folder/name`, from the package's base.

    workers, stop_after: as in `train_base`. Raises ValueError where a run of another config is in the folder.
    """
    check_config(folder / name, config)
    assets = load_assets(folder / "assets.safetensors").split("train")
    device = default_device()
    pipe = load(ModelSpec(dtype="float32", device=str(device), lora=NO_LORA))
    dropper = load(ModelSpec(dtype="float32", device=str(device))).transformer
    with drawn_from(config.seed):
        student = grown(pipe.transformer).to(device)
    pipe.vae.to(memory_format=torch.channels_last)
    for part in (pipe.transformer, dropper, pipe.text_encoder):  # autocast would cast frozen weights in every step
        part.to(torch.bfloat16)
    for part in (pipe.vae, pipe.text_encoder, pipe.transformer, dropper, student):
        part.eval().requires_grad_(False)
    student.single_transformer_blocks[FIRST:].requires_grad_(True)
    if device.type == "cpu":
        for transformer in (pipe.transformer, dropper, student):
            speed_up(transformer)
    batches = Ahead(partial(make_batch, assets, config, pipe.tokenizer), workers)

    @lru_cache(maxsize=IN_TURN)
    def encoded(number: int) -> Encoded:
        return encode(pipe.vae, pipe.text_encoder, batches(number))

    loss = OverviewLoss(config, encoded, pipe.vae, student, pipe.transformer, dropper)
    if not has_begun(folder / name):
        start_from(student, folder / name)
    save_config(folder / name, config)
    train(
        student,
        overview_optimisers(student, config),
        loss,
        folder / name,
        LoopConfig(steps=config.steps, warmup=config.warmup, save_every=100, ema=config.ema, stop_after=stop_after),
    )
