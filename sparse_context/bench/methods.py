"""The ways to make references cheaper that a user would choose among, and the two ends: everything, and nothing.

    (pipes, references, keep) -> (pipe, references)

A method prepares a pipeline and the references for the one call that follows. What it does by then, and what the call
does because of it, is all part of its time. All methods share the weights, so they can be run in turns. To add one,
write a function and give it a line in `METHODS`.
"""

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from PIL import Image

from ..cache import ReferenceCache
from ..config import SparseContextConfig, per_reference
from ..context import Call, SparseContext, install
from ..selection import Selection
from ..sparsify import apply_sparse_context, remove_sparse_context
from ..tokens import ReferenceTokens

Grid = tuple[int, int]


@dataclass
class Pipes:
    """The pipelines that methods prepare, on the same weights: `plain`, and `kv` where the class has such a twin."""

    plain: Any
    kv: Any | None
    cache: ReferenceCache = field(default_factory=ReferenceCache)

    def all(self) -> list[Any]:
        """Those that there are."""
        return [pipe for pipe in (self.plain, self.kv) if pipe is not None]


def make_pipes(pipe: Any) -> Pipes:
    """Pipelines on the weights of `pipe`, which itself is left alone."""
    from diffusers import Flux2KleinKVPipeline, Flux2KleinPipeline

    kv = None
    if isinstance(pipe, Flux2KleinPipeline):
        # Flux2KleinKVPipeline sets attention processors, so its transformer has to be another, of the same weights
        weights = [*pipe.transformer.parameters(), *pipe.transformer.buffers()]
        twin = copy.deepcopy(pipe.transformer, {id(weight): weight for weight in weights})
        kv = Flux2KleinKVPipeline(**{**pipe.components, "transformer": twin})
    distilled = {"is_distilled": pipe.config.is_distilled} if "is_distilled" in pipe.config else {}
    pipes = Pipes(type(pipe)(**pipe.components, **distilled), kv)  # `from_pipe` would cast the shared weights
    for each in pipes.all():
        each.set_progress_bar_config(disable=True)
    return pipes


def dense(pipes: Pipes, references: list, keep: float) -> tuple[Any, list]:
    """The pipeline as it is, all tokens at every step."""
    remove_sparse_context(pipes.plain)
    return pipes.plain, references


def kv(pipes: Pipes, references: list, keep: float) -> tuple[Any, list]:
    """References go through the transformer once, and every step uses their keys and values (FLUX.2 klein KV)."""
    remove_sparse_context(pipes.kv)
    return pipes.kv, references


def sparse(pipes: Pipes, references: list, keep: float) -> tuple[Any, list]:
    """Sparse Context, with its defaults."""
    apply_sparse_context(pipes.plain, keep=keep)
    return pipes.plain, references


def sparse_cached(pipes: Pipes, references: list, keep: float) -> tuple[Any, list]:
    """The same where the references were used before, and so their latents and scores are at hand."""
    apply_sparse_context(pipes.plain, keep=keep, cache=pipes.cache)
    return pipes.plain, references


def sparse_kv(pipes: Pipes, references: list, keep: float) -> tuple[Any, list]:
    """Sparse Context, and what is kept goes through the transformer once."""
    apply_sparse_context(pipes.kv, keep=keep)
    return pipes.kv, references


def downscaled(pipes: Pipes, references: list, keep: float) -> tuple[Any, list]:
    """References scaled down to (as near as a grid comes) as many tokens as the others keep."""
    pipe = pipes.plain

    def lenient(processor: Any) -> Any:
        processor = copy.copy(processor)
        processor.check_image_input = lambda image: image  # it refuses less than 64 pixels
        return processor

    def attach(pipe: Any, call: Call) -> None:
        call.replace("image_processor", lenient)

    install(pipe, SparseContext(SparseContextConfig(keep=keep), attach))
    token = 2 * pipe.vae_scale_factor
    smaller = []
    for reference in references:
        rows, columns = downscaled_grid((reference.height // token, reference.width // token), keep)
        smaller.append(reference.resize((columns * token, rows * token), Image.Resampling.LANCZOS))
    return pipe, smaller


def merged(pipes: Pipes, references: list, keep: float) -> tuple[Any, list]:
    """Neighbouring tokens that are alike become one, their mean, at their centre: see `merge_tokens`."""

    def attach(pipe: Any, call: Call) -> None:
        token = 2 * pipe.vae_scale_factor

        def merge(prepare: Callable, images: list, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
            tokens = ReferenceTokens(*prepare(images, *args, **kwargs))
            start = time.perf_counter()
            kept = merge_tokens(tokens, [(i.shape[2] // token, i.shape[3] // token) for i in images], keep)
            call.select(Selection((), "merge", (), time.perf_counter() - start))
            return kept.latents, kept.ids

        call.around("prepare_image_latents", merge)

    install(pipes.plain, SparseContext(SparseContextConfig(keep=keep), attach))
    return pipes.plain, references


def no_references(pipes: Pipes, references: list, keep: float) -> tuple[Any, list]:
    """None at all, in the same size: the ceiling of every method that drops tokens."""
    remove_sparse_context(pipes.plain)
    return pipes.plain, []


class Method(NamedTuple):
    """`prepare`, whether it reuses keys and values, and whether the dial `keep` means anything to it."""

    prepare: Callable[[Pipes, list, float], tuple[Any, list]]
    kv: bool = False
    keeps: bool = True


METHODS: Mapping[str, Method] = {
    "dense": Method(dense, keeps=False),
    "kv": Method(kv, kv=True, keeps=False),
    "downscaled": Method(downscaled),
    "merged": Method(merged),
    "sparse": Method(sparse),
    "sparse_cached": Method(sparse_cached),
    "sparse_kv": Method(sparse_kv, kv=True),
    "no_references": Method(no_references, keeps=False),
}


def reference_tokens(method: str, grids: Sequence[Grid], keep: float) -> int:
    """How many reference tokens the transformer gets."""
    total = sum(rows * columns for rows, columns in grids)
    if method == "no_references":
        return 0
    if not METHODS[method].keeps:
        return total
    if method == "downscaled":
        return sum(math.prod(downscaled_grid(grid, keep)) for grid in grids)
    if method == "merged":
        return sum(merged_count(grid, keep) for grid in grids)
    return sum(max(1, math.floor(keep * rows * columns + 0.5 + 1e-9)) for rows, columns in grids)  # as budget.py rounds


@lru_cache
def downscaled_grid(grid: Grid, keep: float) -> Grid:
    """The grid (rows, columns) with about `keep` times as many tokens that distorts the picture least.

    Of the grids within 10 % of that number, or else the nearest to it, the one with the nearest aspect, then number.
    """
    wanted = keep * grid[0] * grid[1]

    def price(candidate: Grid) -> tuple[float, float, float]:
        rows, columns = candidate
        off = abs(rows * columns / wanted - 1)
        return (0.0 if off <= 0.1 else off), abs(math.log(rows * grid[1] / (columns * grid[0]))), off

    return min(((r, c) for r in range(1, grid[0] + 1) for c in range(1, grid[1] + 1)), key=price)


def merged_count(grid: Grid, keep: float) -> int:
    """How many tokens of a reference are left after merging."""
    return max(1, round(keep * grid[0] * grid[1]))


def merge_tokens(tokens: ReferenceTokens, grids: Sequence[Grid], keep: float | Sequence[float]) -> ReferenceTokens:
    """Merge the tokens of each reference, latents (B, N, C) and ids (B, N, A) or (N, A), down to the share `keep`, one
    for all or one each.

    Blocks of the grid are halved, and halved again, down to single tokens, and two halves become one where that costs
    least: Ward's (1963) distance, the rise in squared error. A block can only merge once its halves have, so its cost
    is at least theirs, and the cheapest merges are taken until exactly `merged_count` tokens are left. A merged token
    is the mean of its latents, at the mean of their positions. The batch shares one partition, as ids are shared.
    """
    parts, start = [], 0
    for grid, share in zip(grids, per_reference("keep", keep, len(grids)), strict=True):
        end = start + math.prod(grid)
        part = ReferenceTokens(tokens.latents[:, start:end], tokens.ids[..., start:end, :])
        parts.append(_merge(part, grid, merged_count(grid, share)))
        start = end
    return ReferenceTokens(torch.cat([p.latents for p in parts], 1), torch.cat([p.ids for p in parts], -2))


def _merge(tokens: ReferenceTokens, grid: Grid, count: int) -> ReferenceTokens:
    if count == len(tokens):
        return tokens
    rows, columns = grid
    values = tokens.latents.float().transpose(0, 1).flatten(1).view(rows, columns, -1)
    device = values.device
    size = torch.ones(rows, columns, 1, device=device)
    floor = torch.zeros(rows, columns, device=device)  # the cost of all that has to happen within a block before
    levels = []
    height, width = 1, 1  # of the blocks, in tokens
    while values.shape[0] > 1 or values.shape[1] > 1:
        axis = int(values.shape[1] > values.shape[0])
        odd = values.shape[axis] % 2
        if odd:
            pad = (0, 0, 0, odd) if axis else (0, 0, 0, 0, 0, odd)
            values, size = torch.nn.functional.pad(values, pad), torch.nn.functional.pad(size, pad)
            floor = torch.nn.functional.pad(floor, pad[2:])
        (first, second), (n, m), (first_floor, second_floor) = (
            [t.narrow(axis, 0, t.shape[axis]).unfold(axis, 2, 2).select(-1, i) for i in (0, 1)]
            for t in (values, size, floor)
        )
        both = n + m
        ward = (n * m / both.clamp_min(1) * (first - second).square()).sum(-1)
        floor = torch.maximum(torch.maximum(first_floor, second_floor), ward)
        values = (n * first + m * second) / both.clamp_min(1)
        size = both
        levels.append((axis, height, width, floor, (n * m).squeeze(-1) > 0))
        height, width = (height, 2 * width) if axis else (2 * height, width)

    # The cheapest first; among equals those of smaller blocks, so that halves come before their whole. A block whose
    # other half lies outside of the grid is no merge.
    costs = torch.cat([torch.where(real, cost, torch.inf).flatten() for *_, cost, real in levels])
    chosen = torch.zeros(costs.shape, dtype=torch.bool, device=device)
    chosen[torch.argsort(costs, stable=True)[: len(tokens) - count]] = True
    label = torch.arange(len(tokens), device=device).view(rows, columns)
    start = 0
    for axis, height, width, cost, real in levels:
        merge = (chosen[start : start + cost.numel()].view(cost.shape)) & real
        start += cost.numel()
        high, wide = (height, 2 * width) if axis else (2 * height, width)
        inside = merge.repeat_interleave(high, 0).repeat_interleave(wide, 1)[:rows, :columns]
        row, column = torch.arange(rows, device=device), torch.arange(columns, device=device)
        corner = label[(row // high * high)[:, None], (column // wide * wide)[None]]
        label = torch.where(inside, corner, label)
    label = label.flatten()
    places = torch.argsort((label != torch.arange(len(tokens), device=device)).int(), stable=True)[:count]
    members = torch.zeros(len(tokens), device=device).index_add_(0, label, torch.ones(len(tokens), device=device))

    def mean(values: torch.Tensor) -> torch.Tensor:
        sums = torch.zeros(values.shape, device=device).index_add_(-2, label, values.float())
        return (sums / members[:, None]).index_select(-2, places)

    return ReferenceTokens(mean(tokens.latents).to(tokens.latents.dtype), mean(tokens.ids))
