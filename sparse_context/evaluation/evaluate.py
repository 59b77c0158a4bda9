"""Quality against the tokens kept: a grid of settings over samples, each compared with all tokens on the same noise.

Sample i is made with the noise of `seed` + i under every setting, so the difference between two settings is a
difference of pairs, and its interval is one of pairs too. Figures stay there for every sample.

What is in the output folder, all of it written whole or not at all:

    cells/NAME.json     one setting: its figures for each sample; what a run that was stopped need not do again
    dense/SAMPLE.png    the outputs with all tokens, which distances to the dense output are measured from
    shown/NAME/...      outputs and kept tokens of the first samples, for the contact sheets
    result.json         means, 95 % intervals and differences to all tokens, for all samples and for each task
    curves-SCORE.png    quality against the share of tokens kept; sheet-SELECTOR.png: pictures
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ..budget import check_budget
from ..generation import Generation, call_inputs, call_settings, generate
from ..images import check_output, open_picture, save_picture
from ..manifest import Sample, name_problem, same_file
from ..preview import MAX_AREA, draw_selection
from ..result import selection_version, write_result
from ..selection import TASKS, SparseContextConfig
from ..selectors import mask as masks_of
from .metrics import Metric
from .networks import first_line

DENSE = "dense"
"""The name of the setting that keeps all tokens. Every evaluation has it."""

LONGEST_NAME = 200  # bytes: file systems have 255, and a file that is being written has a longer one
SHOWN = 6
"""How many samples' pictures are kept for the contact sheets."""

Maker = Callable[[Sample, SparseContextConfig, int], Generation]
"""(sample, config, seed) -> what a model makes of it: how any pipeline is evaluated."""


@dataclass(frozen=True)
class Cell:
    """One setting of the grid.

    config: what is kept. limit: of how many samples, from the first; None for all. make: how its samples are made;
    None: as `evaluate` is told. about: what else its figures depend on, such as a name for `make`, which resuming
    cannot compare; it goes before the `about` of `evaluate`.
    """

    config: SparseContextConfig
    limit: int | None = None
    make: Maker | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The setting, for JSON. A selector without a name goes by its label."""
        values = {one.name: getattr(self.config, one.name) for one in fields(self.config) if one.name != "seed"}
        return {**values, "selector": _label(self.config), "limit": self.limit, **self.about}


def _label(config: SparseContextConfig) -> str:
    selector: Any = config.selector
    if selector is None:
        return "auto"
    if isinstance(selector, Mapping):
        return ",".join(f"{name}={weight:g}" for name, weight in selector.items())
    return selector if isinstance(selector, str) else getattr(selector, "__name__", type(selector).__name__)


def grid(
    keeps: Sequence[float | int | str],
    selectors: Sequence[Any] = (None,),
    *,
    tasks: Sequence[str] = ("auto",),
    coverages: Sequence[float | None] = (None,),
    merges: Sequence[float] = (0.0,),
    limits: Mapping[float | int | str, int] | None = None,
    **settings: Any,
) -> dict[str, Cell]:
    """A cell for every keep, selector, task, coverage and merge, by name; all tokens are one cell, `DENSE`, the first.

    limits: how many samples at one keep. settings: other fields of `SparseContextConfig`, such as share.
    Raises ValueError for a value out of range, and for two settings of one name (two functions may have the same).
    """
    limits = limits or {}
    everything = next((keep for keep in keeps if _keeps_all(keep)), 1.0)
    cells = {DENSE: Cell(SparseContextConfig(keep=1.0), limits.get(everything))}
    sparse = [keep for keep in keeps if not _keeps_all(keep)]
    for selector, task, coverage, merge, keep in product(selectors, tasks, coverages, merges, sparse):
        config = SparseContextConfig(
            keep=keep, selector=selector, task=task, coverage=coverage, merge=merge, **settings
        )
        parts = [_label(config), keep]
        parts += [] if task == "auto" else [task]
        parts += [] if coverage is None else [f"coverage={coverage:g}"]
        parts += [f"merge={merge:g}"] if merge else []
        name, cell = re.sub(r"[^\w.,=+-]+", "_", "-".join(map(str, parts))), Cell(config, limits.get(keep))
        if cells.setdefault(name, cell) != cell:
            raise ValueError(f"Two settings are named {name!r}: give each function a name of its own.")
    return cells


def _keeps_all(keep: Any) -> bool:
    check_budget(keep)
    return not isinstance(keep, str) and keep == 1


def maker(
    pipe: Any,
    *,
    steps: int | None = None,
    guidance_scale: float | None = None,
    task_of: Callable[[Sample], str | Sequence[str]] | None = None,
) -> Maker:
    """How `generation.generate` makes a sample with `pipe`.

    The output has the size that the model's own call settings name, else that of the sample's `image` in whole tokens
    and at most a megapixel, else what the pipeline takes from the references. (LongCat always does the latter.)

    Where a setting's task is "auto", the sample's own is used: `task_of(sample)`, one for all references or one for
    each; by default `sample.task`, if that is a name of `TASKS`. A selector that was named is taken at its word then
    too: the task adds no coverage to it.
    """
    fixed = "height" in call_settings(pipe) or "height" not in call_inputs(pipe)

    def make(sample: Sample, config: SparseContextConfig, seed: int) -> Generation:
        height = width = None
        truth = None if fixed else sample.open_image()
        if truth is not None:
            token = 2 * pipe.vae_scale_factor
            scale = min(1.0, math.sqrt(MAX_AREA / (truth.width * truth.height)))
            width, height = (max(token, int(side * scale) // token * token) for side in truth.size)
        task = task_of(sample) if task_of is not None else sample.task if sample.task in TASKS else "auto"
        if config.task == "auto" and task != "auto":
            plain = config.selector is not None and config.coverage is None
            config = replace(config, task=task, coverage=0.0 if plain else config.coverage)
        return generate(pipe, sample.open_references(), sample.prompt, config, seed=seed, steps=steps,
                        height=height, width=width, guidance_scale=guidance_scale)  # fmt: skip

    return make


def fingerprint(pipe: Any) -> str:
    """What the weights of a pipeline, adapters included, are told apart by: some values of every tensor of its parts.

    For `about` of `evaluate`: training may have put others in the place of a folder or file of the same name.
    """
    digest = hashlib.sha256()
    for name, part in sorted(pipe.components.items()):
        for key, weight in part.state_dict().items() if isinstance(part, torch.nn.Module) else ():
            digest.update(f"{name}.{key} {tuple(weight.shape)}".encode())
            values = weight.detach().flatten()
            digest.update(values[:: max(1, len(values) // 64)].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def evaluate(
    make: Maker,
    samples: Sequence[Sample],
    cells: Mapping[str, Cell],
    metrics: Mapping[str, Metric],
    folder: Path,
    *,
    seed: int = 0,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Run every cell over the samples and return the result that is also written to `folder`/result.json.

    make: see `maker`; a cell may have its own. cells: see `grid`; the first is `DENSE`. metrics: see
    `metrics.find_metrics`. about: what else the figures depend on (model, adapter, `fingerprint` of their weights,
    steps ...), for the record.

    A cell whose file is there is not run again. Raises ValueError where that file is of other settings, and, before
    anything is made, where a sample lacks what a setting needs or has a picture that cannot be read.
    """
    if next(iter(cells), None) != DENSE:
        raise ValueError(
            f"The first cell is {next(iter(cells), None)!r}: begin with {DENSE!r}, which keeps all tokens."
        )
    counts = {
        name: len(samples) if cell.limit is None else min(cell.limit, len(samples)) for name, cell in cells.items()
    }
    if not samples or max(counts.values()) > counts[DENSE]:
        raise ValueError("There are samples that are not made with all tokens: raise the limit of the dense cell.")
    measured = sorted(name if one.model is None else f"{name}={one.model}" for name, one in metrics.items())
    settings = {**(about or {}), "seed": seed, "metrics": measured, "selection": selection_version()}
    configs = {
        name: {**settings, "samples": counts[name], "digest": _digest(samples[: counts[name]]), **cell.to_dict()}
        for name, cell in cells.items()
    }
    done = {name: _read_cell(folder / "cells" / f"{name}.json", configs[name]) for name in cells}
    names = [sample.name for sample in samples[: counts[DENSE]]]
    for name in names:
        size = len(name.encode("utf-8", "surrogatepass"))
        if size > LONGEST_NAME:
            raise ValueError(
                f"A sample's name has {size} bytes, and its pictures go by it: give it one of {LONGEST_NAME} at most "
                f"({name[:40]} ...)."
            )
        if advice := name_problem(name):
            raise ValueError(f"A sample is named {name!r}, which no file can be: {advice}.")
    for kind, each in (("samples", names), ("settings", list(cells))):
        if twice := same_file(each):
            says = (
                repr(twice[0]) if twice[0] == twice[1] else f"{twice[0]!r} and {twice[1]!r}, one file on some systems"
            )
            raise ValueError(f"Two {kind} are named {says}: give each a name of its own.")
    if not all((folder / DENSE / f"{name}.png").is_file() for name in names):
        done[DENSE] = None  # the others are compared with its pictures
    if any(rows is None for rows in done.values()):
        masked = [counts[n] for n, cell in cells.items() if done[n] is None and _asks_for_masks(cell.config)]
        _check(samples[: counts[DENSE]], max(masked, default=0))
    left = sum(counts[name] for name, rows in done.items() if rows is None)
    with tqdm(total=left, unit="output", desc="evaluate", disable=not left) as bar:
        for name, cell in cells.items():
            if done[name] is None:
                bar.set_postfix_str(name)
                rows, how = [], cell.make or make
                for i, sample in enumerate(samples[: counts[name]]):
                    try:
                        rows.append(_run(how, sample, name, cell.config, metrics, folder, seed + i, shown=i < SHOWN))
                    except ValueError as error:
                        raise ValueError(f"Sample {sample.name}, setting {name}: {error}") from error
                    bar.update()
                figures = {"samples": rows}
                write_result(folder / "cells" / f"{name}.json", f"evaluation of {name}", configs[name], figures)
                done[name] = rows
    config = {**settings, "cells": {name: cell.to_dict() for name, cell in cells.items()}}
    figures = summarise({name: rows for name, rows in done.items() if rows is not None})
    return write_result(folder / "result.json", "evaluation", config, figures)


def open_folder(folder: Path) -> None:
    """Make the output folder, or say before any work starts why it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder} cannot be a folder ({error.strerror}): choose another --output.") from error
    check_output(folder / "curves.png")


def _check(samples: Sequence[Sample], masked: int) -> None:
    """Open every picture once, so that a bad one is named before any work is done; of the first `masked` also masks."""
    for i, sample in enumerate(tqdm(samples, unit="sample", desc="pictures", delay=2)):
        sample.open_references()
        sample.open_image()
        sample.open_mask()
        if i < masked:
            _oracle(sample)


def _digest(samples: Sequence[Sample]) -> str:
    """What samples are told apart by: their text, and their pictures' bytes or paths and sizes."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(repr((sample.name, sample.prompt, sample.task)).encode("utf-8", "surrogatepass"))
        for picture in (*sample.references, sample.image, sample.mask, *sample.reference_masks):
            size = picture.stat().st_size if isinstance(picture, Path) and picture.is_file() else None
            digest.update(repr((picture, size)).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


def _read_cell(path: Path, config: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The figures of a cell that was finished before, or None. Raises ValueError where they are of other settings."""
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        before, rows = record["config"], record["figures"]["samples"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no figures of an evaluation: remove it, or give another folder.") from error
    now = json.loads(json.dumps(config))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            if key == "digest":
                raise ValueError(f"{path} has figures of other samples: give another folder, or remove it.")
            raise ValueError(
                f"{path} is of {key} {before.get(key)!r} and not {now.get(key)!r}: give another folder, or remove it."
            )
    return rows


def _run(
    make: Maker,
    sample: Sample,
    name: str,
    config: SparseContextConfig,
    metrics: Mapping[str, Metric],
    folder: Path,
    seed: int,
    shown: bool,
) -> dict[str, Any]:
    """Make one sample under one setting: its figures."""
    if _asks_for_masks(config):
        given: Any = _oracle(sample)
        if isinstance(config.selector, Mapping):
            given = {given if part == "mask" else part: weight for part, weight in config.selector.items()}
        config = replace(config, selector=given)
    made = make(sample, replace(config, seed=seed), seed)
    output = made.image.convert("RGB")
    path = folder / "dense" / f"{sample.name}.png"
    if name == DENSE:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_picture(output, path)
    dense = None if name == DENSE else open_picture(path)
    if shown and name != DENSE:
        place = folder / "shown" / name
        place.mkdir(parents=True, exist_ok=True)
        save_picture(output, place / f"{sample.name}.png")
        if made.selection is not None:
            (place / "tokens").mkdir(exist_ok=True)
            save_picture(draw_selection(made.selection, height=192), place / "tokens" / f"{sample.name}.png")
    tokens = (made.selection.kept, made.selection.total) if made.selection else (0, 0)
    return {"name": sample.name, "task": sample.task, "kept": tokens[0], "total": tokens[1],
            "seconds": round(made.times.total, 4), "scores": dict(_scores(output, sample, dense, metrics))}  # fmt: skip


def _asks_for_masks(config: SparseContextConfig) -> bool:
    """Whether the sample's own masks decide, alone or in a blend."""
    return "mask" in config.selector if isinstance(config.selector, Mapping) else config.selector == "mask"


def _oracle(sample: Sample) -> Any:
    """The selector that keeps what the sample's own masks of its references cover; all of one that has none."""
    given = sample.open_reference_masks()
    if all(mask is None for mask in given):
        raise ValueError(
            f"The selector 'mask' needs masks, and the sample {sample.name} has none: add reference_masks or pictures "
            "with transparency, or leave this selector out."
        )
    sizes = [picture.size for picture in sample.open_references()]
    return masks_of([Image.new("L", s, 255) if m is None else m for m, s in zip(given, sizes, strict=True)])


def _scores(
    output: Image.Image, sample: Sample, dense: Image.Image | None, metrics: Mapping[str, Metric]
) -> Iterator[tuple[str, float | None]]:
    """The figures of one output, by name: None where there is nothing to compare with."""
    truth, mask = _fit(sample.open_image(), output), _fit(sample.open_mask(), output)
    kinds = {metric.against for metric in metrics.values()}
    references = sample.open_references() if kinds & {"references", "source", "caption"} else []
    edited = None
    if any(metric.masked and metric.against in ("source", "prompt") for metric in metrics.values()):
        edited = _fit((sample.open_reference_masks() or [None])[0], output)
    for name, metric in metrics.items():
        function = partial(_measure, name, metric.function)
        if metric.against == "references":
            yield name, _number(np.mean([function(output, r.convert("RGB"), None) for r in references]))
        elif metric.against == "prompt":  # what the output shows, where the prompt says what to do instead
            text = getattr(sample, "caption", sample.prompt)
            yield name, _number(function(output, text, edited if metric.masked else None))
        elif metric.against == "caption":
            yield name, _number(function(references[0], getattr(sample, "source_caption"), None))  # noqa: B009
        elif metric.against == "source":
            source = _fit(references[0], output)
            yield name, _number(function(output, source, edited if metric.masked else None))
        else:
            if truth is not None:
                yield name, _number(function(output, truth, None))
                if metric.masked and mask is not None:
                    yield f"{name}_in_mask", _number(function(output, truth, mask))
            if dense is not None:
                yield f"{name}_to_dense", _number(function(output, dense, None))


def _measure(name: str, function: Callable[..., float], output: Image.Image, truth: Any, mask: Any) -> float:
    try:
        return function(output, truth, mask)
    except ValueError:
        raise
    except Exception as error:  # a model of another kind, memory that ran out
        raise ValueError(
            f"The metric {name} failed ({first_line(error)}): leave it out, or change its model."
        ) from error


def _fit(picture: Image.Image | None, output: Image.Image) -> Image.Image | None:
    """A picture or mask in the size of the output."""
    if picture is None:
        return None
    picture = picture if picture.mode == "L" else picture.convert("RGB")
    return picture if picture.size == output.size else picture.resize(output.size, Image.Resampling.LANCZOS)


def _number(value: Any) -> float | None:
    return round(float(value), 6) if math.isfinite(value) else None


# From figures of samples to figures of settings -----------------------------------------------------------------------


def bootstrap_interval(values: Sequence[float], seed: int = 0, resamples: int = 2000) -> tuple[float, float]:
    """The 95 % interval of the mean by the percentile bootstrap (Efron 1979): (low, high).

    The same values give the same interval. A single value has none: (nan, nan).
    """
    if len(values) < 2:
        return math.nan, math.nan
    means = _draws(len(values), seed, resamples) @ np.asarray(values, np.float64) / len(values)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


@lru_cache(maxsize=8)
def _draws(count: int, seed: int, resamples: int) -> np.ndarray:
    """How often each of `count` values is drawn in each resample: float64 (resamples, count)."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), resamples).astype(np.float64)


def summarise(cells: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Groups of samples ("all", and each task where there are several), in them the cells, and in these their scores.

    A score has `n` samples, their `mean` and its `interval`; and, paired with the dense cell over the samples that both
    have, `difference` (cell minus dense) and `difference_interval`. Intervals are of 95 %, None with fewer than two.
    """
    tasks = dict.fromkeys(row["task"] for row in cells[DENSE])
    named = [task for task in tasks if task not in (None, "all")] if len(tasks) > 1 else []
    groups: dict[str, Any] = {}
    for group in ["all", *named]:
        groups[group] = {}
        for name, rows in cells.items():
            inside = [row for row in rows if group in ("all", row["task"])]
            if inside:
                dense = {row["name"]: row["scores"] for row in cells[DENSE]}
                groups[group][name] = _summary(inside, dense)
    return groups


def _summary(rows: list[dict[str, Any]], dense: Mapping[str, Mapping[str, float | None]]) -> dict[str, Any]:
    shares = [row["kept"] / row["total"] for row in rows if row["total"]]
    scores: dict[str, Any] = {}
    for score in dict.fromkeys(score for row in rows for score in row["scores"]):
        values = {row["name"]: row["scores"].get(score) for row in rows}
        there = {sample: value for sample, value in values.items() if value is not None}
        if not there:
            continue
        before = {sample: dense[sample].get(score) for sample in there}
        pairs = [there[sample] - value for sample, value in before.items() if value is not None]
        scores[score] = {"n": len(there), **_mean(list(there.values()), "mean", "interval")}
        if pairs:
            scores[score] |= _mean(pairs, "difference", "difference_interval")
    seconds = float(np.median([row["seconds"] for row in rows]))
    return {"samples": len(rows), "kept": round(float(np.mean(shares)), 4) if shares else None,
            "median_seconds": round(seconds, 4), "scores": scores}  # fmt: skip


def _mean(values: list[float], name: str, interval: str) -> dict[str, Any]:
    low, high = bootstrap_interval(values)
    return {
        name: round(float(np.mean(values)), 6),
        interval: None if math.isnan(low) else [round(low, 6), round(high, 6)],
    }


def table(result: Mapping[str, Any]) -> str:
    """The result as lines of text: a block for each group, a line for each cell, means and differences to dense."""
    lines = []
    for group, cells in result["figures"].items():
        scores = list(dict.fromkeys(score for cell in cells.values() for score in cell["scores"]))
        lines.append(f"{group}: {cells[DENSE]['samples']} samples")
        width = max(len(name) for name in cells) + 2
        lines.append(" " * width + f"{'kept':>8}" + "".join(f"{score:>{_width(score)}}" for score in scores))
        for name, cell in cells.items():
            kept = "" if cell["kept"] is None else f"{100 * cell['kept']:.1f} %"
            line = f"{name:<{width}}{kept:>8}"
            for score in scores:
                line += f"{_show(cell['scores'].get(score), name == DENSE):>{_width(score)}}"
            lines.append(line)
    return "\n".join(lines)


def _width(score: str) -> int:
    return max(len(score) + 2, 18)


def _show(entry: Mapping[str, Any] | None, dense: bool) -> str:
    if entry is None:
        return "-"
    difference = "" if dense or "difference" not in entry else f" ({entry['difference']:+.3g})"
    return f"{entry['mean']:.4g}{difference}"
