"""What calls would take, from shapes alone: `sparse-context bench --predict`."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..pipelines.embedded import WEIGHTS
from ..pipelines.load import DTYPES
from ..pipelines.predict import Parts, Prediction, Predictor, grid_of, parts_of_model, parts_of_shape
from ..pipelines.settings import most_references, read_settings
from ..pipelines.spec import ModelSpec
from ..result import write_result
from .config import BenchConfig
from .figures import Setting
from .methods import METHODS, reference_tokens
from .run import check_arguments
from .shapes import find_shape

GIB, GB = 2**30, 10**9


@dataclass(frozen=True)
class Predicted:
    """One setting, and what its call takes."""

    setting: Setting
    call: Prediction

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self.setting) | self.call.to_dict()


@dataclass(frozen=True)
class Fit:
    """The largest keep with which calls stay within a device's memory; None where none does."""

    size: int
    references: int
    keep: float | None


def predict(
    config: BenchConfig,
    *,
    model: str | None = None,
    random_weights: str | None = None,
    memory: float | None = None,
    cpu_offload: str | None = None,
    dtype: str = "auto",
    output: Path | None = None,
) -> tuple[list[Predicted], list[Fit]]:
    """The settings of `config`, each with what it takes; and with `memory`, in GB, the largest keep that fits.

    A model's configs are read, and none of its weights; without `model` and `random_weights` those of the embedded
    model. References have the size of the output, or that which the model names. Raises ValueError for a model that is
    no plain pipeline, and for a method that it does not have.
    """
    check_arguments(model, random_weights, None, dtype, output)
    if memory is not None and not 0 < memory < math.inf:
        raise ValueError(f"memory is {memory:g}: pass gigabytes, a number above 0.")
    ModelSpec(cpu_offload=cpu_offload)  # raises for what is no kind of it
    kind = DTYPES.get(dtype, torch.float32 if model is None and random_weights is None else torch.bfloat16)
    path = str(WEIGHTS) if model is None else model
    settings = {} if random_weights else read_settings(path)
    most = None if random_weights else most_references(path)
    if most is not None and max(config.references) > most:
        raise ValueError(f"references is {max(config.references)}, and this model takes at most {most}: pass fewer.")

    def parts(kv: bool) -> Parts:
        if random_weights is not None:
            return parts_of_shape(find_shape(random_weights), kind, kv, cpu_offload)
        return parts_of_model(path, kind, kv, cpu_offload, settings.get("max_sequence_length"))

    plain = parts(kv=False)
    shape = plain.shape
    methods = config.methods or ("dense", "sparse")
    for method in methods:
        if METHODS[method].kv and not shape.kind.kv:
            raise ValueError(f"method is {method!r}, and only FLUX.2 reuses keys and values: leave out kv, sparse_kv.")
    predictors = {False: Predictor(plain)}
    if any(METHODS[method].kv for method in methods):
        predictors[True] = Predictor(parts(kv=True))
    steps = config.steps or settings.get("num_inference_steps") or shape.steps
    rows, fits = [], []
    for size in config.size or (settings.get("height") or 1024,):
        if size % shape.token:
            raise ValueError(f"size is {size}: this model makes multiples of {shape.token}.")
        output_grid = grid_of(size, size, shape.token)
        for count in config.references:
            side = _reference_side(settings.get("reference_size"), count) or size
            grids = [grid_of(side, side, shape.token)] * count
            for method, keep in config.cells(methods):
                kept = reference_tokens(method, grids, 0.0 if keep is None else keep)
                call = predictors[METHODS[method].kv](grids if kept else [], kept, output_grid, steps)
                rows.append(Predicted(Setting(size, count, method, keep), call))
            if memory is not None:
                largest = predictors[False].largest_keep(grids, output_grid, int(memory * GB), steps)
                fits.append(Fit(size, count, largest))
    if output is not None:
        about = {
            "model": model or random_weights or "embedded",
            "dtype": str(kind).removeprefix("torch."),
            "steps": steps,
            "cpu_offload": cpu_offload,
            "memory": memory,
        }
        write_result(
            output, "predict", about, {"rows": [row.to_dict() for row in rows], "fits": [asdict(fit) for fit in fits]}
        )
    return rows, fits


def _reference_side(reference_size: Any, count: int) -> int | None:
    """The size that a model scales references to: one number, or one for each task."""
    if isinstance(reference_size, dict):
        return reference_size.get("edit" if count == 1 else "subject")
    return reference_size


PHASES = ("text", "encode", "denoise", "decode")
HEAD = ("size", "references", "method", "keep", "tokens", "TFLOP", *PHASES, "whole")


def summary(rows: Sequence[Predicted], fits: Sequence[Fit], memory: float | None) -> str:
    """A table, and below it what fits: what the command prints. Memory in GiB, of the phases beside the weights."""
    lines = [HEAD, *map(_cells, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    weights = rows[0].call.weights
    named = ", ".join(f"{name} {size / GIB:.2f}" for name, size in weights.items())
    text.append(f"Weights in GiB: {named}. Phases are what they take beside these, and whole is the peak with them.")
    for fit in fits:
        kept = "no keep fits" if fit.keep is None else f"keep={fit.keep:g} and less fits"
        text.append(f"{fit.references} references, {fit.size} pixels: {kept} into {memory:g} GB.")
    return "\n".join(text)


def _cells(row: Predicted) -> tuple[str, ...]:
    setting, call = row.setting, row.call
    return (
        str(setting.size),
        str(setting.references),
        setting.method,
        "" if setting.keep is None else f"{setting.keep:g}",
        str(call.tokens.references),
        f"{call.flops / 1e12:.2f}",
        *(f"{call.activations[phase] / GIB:.2f}" if phase in call.activations else "" for phase in PHASES),
        f"{call.peak / GIB:.2f}",
    )
