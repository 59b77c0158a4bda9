"""A few blocks of a large transformer, timed for the whole."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from ..families.shape import Shape, Tokens, with_blocks
from ..pipelines.timing import now
from .build import build_transformer
from .config import BenchConfig
from .figures import Figures, Measurement, Setting
from .flops import Pass, passes
from .methods import METHODS, reference_tokens
from .report import compare
from .turns import take_turns


def bench_blocks(shape: Shape, blocks: int, device: torch.device, dtype: torch.dtype, config: BenchConfig) -> Figures:
    """Time denoising alone, with `blocks` of each kind of block of a shape in place of all.

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
    forwards: dict[tuple[str | None, Tokens], Callable[[], float]] = {}
    extracted: dict[Tokens, Any] = {}
    calls: list[tuple[Setting, Tokens, list[Pass]]] = []
    for size in config.size or (1024,):
        if size % shape.token:
            raise ValueError(f"size is {size}: this model makes multiples of {shape.token}.")
        grid = (size // shape.token, size // shape.token)
        for count in config.references:
            for method, keep in config.cells(methods):
                kept = reference_tokens(method, [grid] * count, 0.0 if keep is None else keep)
                tokens = Tokens(shape.text, grid[0] * grid[1], kept)
                needed = passes(steps, tokens, METHODS[method].kv)
                for mode, _ in needed:
                    forwards.setdefault((mode, tokens), _forward(transformer, shape, tokens, mode, extracted))
                calls.append((Setting(size, count, method, keep), tokens, needed))
    turns = _time(forwards, device, config)
    count = len(next(iter(turns.values())))
    whole = (shape.double_blocks + shape.single_blocks) / (few.double_blocks + few.single_blocks)
    measurements = []
    for setting, tokens, needed in calls:
        seconds = [sum(times * turns[mode, tokens][i] for mode, times in needed) for i in range(count)]
        extrapolated = round(whole * median(seconds), 3) if kind.alike else None
        measurements.append(Measurement(setting, tokens, {"denoise": seconds}, extrapolated=extrapolated))
    return Figures(
        turns=count,
        steps=steps,
        rows=compare(measurements, few),
        blocks=(few.double_blocks, few.single_blocks),
        of=(shape.double_blocks, shape.single_blocks),
    )


def _time(
    forwards: Mapping[tuple[str | None, Tokens], Callable[[], float]], device: torch.device, config: BenchConfig
) -> dict[tuple[str | None, Tokens], list[float]]:
    """The seconds of each forward, one a turn. On a CPU the shortest warms up for all: the longest takes minutes."""
    shortest = min(forwards, key=lambda forward: forward[1].total)
    jobs = [
        lambda warm_up, key=key: forwards[key]() if not warm_up or key == shortest or device.type == "cuda" else 0.0
        for key in forwards
    ]
    return dict(zip(forwards, take_turns(jobs, config), strict=True))


def _forward(
    transformer: Any, shape: Shape, tokens: Tokens, mode: str | None, extracted: dict[Tokens, Any]
) -> Callable[[], float]:
    """A function that runs one forward and gives its seconds. "extract" leaves in `extracted` what "cached" takes."""
    arguments, device = shape.kind.arguments, transformer.device

    @torch.no_grad()
    def run() -> float:
        inputs = arguments(transformer, shape, tokens, mode)
        if mode == "cached":
            inputs["kv_cache"] = extracted[tokens]
        start = now(device)
        output = transformer(**inputs, return_dict=False)
        seconds = now(device) - start
        if mode == "extract":
            extracted[tokens] = output[1]
        elif mode == "cached":
            extracted.pop(tokens).clear()
        return seconds

    return run
