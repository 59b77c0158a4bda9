"""A few blocks of a large transformer, timed for the whole."""

from collections.abc import Callable
from dataclasses import asdict, replace
from statistics import median
from typing import Any

import torch

from ..families.shape import Shape, Tokens, with_blocks
from ..pipelines.timing import now
from .build import build_transformer
from .config import BenchConfig
from .flops import passes
from .methods import METHODS, reference_tokens
from .report import compare
from .turns import take_turns


def bench_blocks(
    shape: Shape, blocks: int, device: torch.device, dtype: torch.dtype, config: BenchConfig
) -> dict[str, Any]:
    """Denoising alone, with `blocks` of each kind of block of a shape in place of all; returns the figures.

    A call is put together from its forwards: each is timed once a turn, and counts as often as the call runs it. What
    a method would do to pixels and to the VAE is not measured, so `sparse_cached` is no other than `sparse`, and merged
    and downscaled references, which have as many tokens, neither: they are left out. `extrapolated` is the median of
    denoising with as many blocks as the model has, had each the time of these; no such call was made. There is none
    where a model's blocks differ in what they cost. Raises ValueError for a method that the transformer does not have.
    """
    kind = shape.kind
    for method in config.methods or ():
        if METHODS[method].kv and not kind.kv:
            raise ValueError(f"method is {method!r}, and only FLUX.2 reuses keys and values: leave out kv, sparse_kv.")
    left_out = {"sparse_cached", "merged", "downscaled"}
    methods = [m for m in config.methods or METHODS if m not in left_out and (kind.kv or not METHODS[m].kv)]
    steps = config.steps or shape.steps
    few = replace(with_blocks(shape, blocks), steps=steps)
    transformer = build_transformer(shape, device, dtype, blocks).eval()
    runs: dict[tuple[str | None, Tokens], Callable[[], float]] = {}
    extracted: dict[Tokens, Any] = {}
    rows, needs = [], []
    for size in config.size or (1024,):
        if size % shape.token:
            raise ValueError(f"size is {size}: this model makes multiples of {shape.token}.")
        grid = (size // shape.token, size // shape.token)
        for count in config.references:
            for method, keep in config.cells(methods):
                kept = reference_tokens(method, [grid] * count, 0.0 if keep is None else keep)
                tokens = Tokens(shape.text, grid[0] * grid[1], kept)
                needed = [(each.mode, tokens, each.times) for each in passes(steps, tokens, METHODS[method].kv)]
                for mode, _, _ in needed:
                    runs.setdefault((mode, tokens), _forward(transformer, shape, tokens, mode, extracted))
                needs.append(needed)
                rows.append(
                    {"size": size, "references": count, "method": method, "keep": keep, "tokens": asdict(tokens)}
                )
    # The shortest is the warm-up for all: on a CPU the longest takes minutes
    shortest = min(runs, key=lambda run: run[1].total)
    warm = [
        lambda first, key=key: runs[key]() if not first or key == shortest or device.type == "cuda" else 0.0
        for key in runs
    ]
    turns = dict(zip(runs, take_turns(warm, config), strict=True))
    whole = (shape.double_blocks + shape.single_blocks) / (few.double_blocks + few.single_blocks)
    for row, needed in zip(rows, needs, strict=True):
        counts = range(len(turns[shortest]))
        seconds = [sum(times * turns[mode, tokens][i] for mode, tokens, times in needed) for i in counts]
        row["seconds"] = {"denoise": seconds}
        if kind.alike:
            row["extrapolated"] = round(whole * median(seconds), 3)
    return {
        "turns": len(turns[shortest]),
        "steps": steps,
        "blocks": [few.double_blocks, few.single_blocks],
        "of": [shape.double_blocks, shape.single_blocks],
        "rows": compare(rows, few),
    }


def _forward(
    transformer: Any, shape: Shape, tokens: Tokens, mode: str | None, extracted: dict[Tokens, Any]
) -> Callable[[], float]:
    """A function that runs one forward and gives its seconds. "extract" leaves in `extracted` what "cached" takes."""
    arguments, device = shape.kind.arguments, transformer.device

    @torch.no_grad()
    def run() -> float:
        given = arguments(transformer, shape, tokens, mode)
        if mode == "cached":
            given["kv_cache"] = extracted[tokens]
        start = now(device)
        made = transformer(**given, return_dict=False)
        seconds = now(device) - start
        if mode == "extract":
            extracted[tokens] = made[1]
        elif mode == "cached":
            extracted.pop(tokens).clear()
        return seconds

    return run
