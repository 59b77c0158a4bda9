"""A benchmark from its settings to its record."""

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ..embedded.demo import read_examples
from ..evaluation.plots import check_matplotlib
from ..images import check_file
from ..pipelines.errors import TooLargeError
from ..pipelines.load import DTYPES, find_device, load
from ..pipelines.spec import ModelSpec
from ..result import checkout, write_result
from .blocks import bench_blocks
from .build import build_pipeline
from .calls import bench
from .config import BenchConfig
from .figures import Figures
from .report import plot
from .shapes import find_shape


def run_bench(
    config: BenchConfig,
    *,
    model: str | None = None,
    random_weights: str | None = None,
    blocks: int | None = None,
    dtype: str = "auto",
    device: str | None = None,
    output: Path | None = None,
    plot_to: Path | None = None,
    quality: Sequence[dict[str, Any]] = (),
) -> Figures:
    """What `sparse-context bench` does: build or load the model, measure, write JSON and plot.

    Without `model` and `random_weights` the embedded model is measured. `took` of the figures are the seconds of
    it all, loading and the warm-up included. Raises ValueError for arguments that do not go together, before any work.
    """
    check_arguments(model, random_weights, blocks, dtype, output)
    if plot_to is not None:
        check_matplotlib()
    shape = None if random_weights is None else find_shape(random_weights)
    if shape is not None and blocks is None and not shape.kind.whole:
        raise ValueError(f"random_weights is {random_weights!r}, of which only blocks can be timed: pass blocks.")
    checkout()  # of the code that runs, whatever is committed meanwhile
    where, start = find_device(device), time.perf_counter()
    weights = DTYPES.get(dtype, torch.bfloat16)
    example = next(each for each in read_examples() if len(each["references"]) == 4)
    try:
        if shape is not None and blocks is not None:
            figures = bench_blocks(shape, blocks, where, weights, config)
        else:
            pipe = (
                load(ModelSpec(model, dtype=dtype, device=device))
                if shape is None
                else build_pipeline(shape, where, weights)
            )
            weights = pipe.transformer.dtype
            if shape is not None and config.steps is None:
                config = replace(config, steps=shape.steps)
            figures = bench(pipe, example["references"], example["prompt"], config)
    except (torch.OutOfMemoryError, TooLargeError) as error:
        raise ValueError("The device's memory ran out: choose a smaller shape or size, or blocks=1.") from error
    figures.took = round(time.perf_counter() - start, 1)
    record = {
        "model": model or random_weights or "embedded",
        "random_weights": shape is not None,
        **{k: v for k, v in asdict(config).items() if k != "steps"},
        "dtype": str(weights).removeprefix("torch."),
        "device": torch.cuda.get_device_name(where) if where.type == "cuda" else where.type,
        "threads": torch.get_num_threads(),
    }
    if output is not None:
        write_result(output, "bench", record, asdict(figures))
    if plot_to is not None:
        plot(figures, plot_to, quality)
    return figures


def check_arguments(
    model: str | None, random_weights: str | None, blocks: int | None, dtype: str, output: Path | None
) -> None:
    """Raise ValueError for arguments that do not go together."""
    if random_weights is not None and model is not None:
        raise ValueError("A model and random_weights were given: choose one of the two.")
    if blocks is not None and random_weights is None:
        raise ValueError("blocks is for shapes: name one with random_weights.")
    if blocks is not None and blocks < 1:
        raise ValueError(f"blocks is {blocks}: pass a number above 0.")
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}: choose auto, {', '.join(DTYPES)}.")
    if output is not None:
        check_file(output)
