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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ..config import SparseContextConfig
from ..images import check_output, open_picture, save_picture
from ..pipelines.embedded import OVERVIEW
from ..pipelines.engine import Engine
from ..pipelines.errors import GenerationError
from ..preview import draw_selection
from ..result import checkout, write_result
from ..samples import LONGEST_NAME, Sample, name_problem, open_any, same_file
from ..selection import selection_version, version_beside
from ..selectors.masks import mask as masks_of
from ..selectors.registry import find_text
from .benchmark import BenchmarkSample
from .grid import DENSE, Cell, Maker
from .metrics import Metric, measure
from .report import SHOWN
from .statistics import summarise

LAST_SEED = 2**63 - 1


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


def engine_fingerprint(engine: Engine) -> str:
    """`fingerprint` of all that an engine may answer with: the embedded model has weights of its own for overviews."""
    found = fingerprint(engine.pipe())
    if not engine.has_own_weights or not OVERVIEW.is_file():
        return found
    return hashlib.sha256(found.encode() + OVERVIEW.read_bytes()).hexdigest()[:16]


def evaluate(
    make: Maker,
    samples: Sequence[Sample],
    cells: Mapping[str, Cell],
    metrics: Mapping[str, Metric],
    folder: Path,
    *,
    seed: int = 0,
    about: Mapping[str, Any] | None = None,
    keep_outputs: bool = False,
    bar: bool = True,
) -> dict[str, Any]:
    """Run every cell over the samples and return the result that is also written to `folder`/result.json.

    make: see `maker`; a cell may have its own. cells: see `grid`; the first is `DENSE`. metrics: see
    `metrics.find_metrics`. about: what else the figures depend on (model, adapter, `fingerprint` of their weights,
    steps ...), for the record. keep_outputs: whether every output stays, and not those of the first samples alone. bar:
    whether progress is shown.

    A cell whose file is there is not run again. Raises ValueError where that file is of other settings, and, before
    anything is made, where a sample lacks what a setting needs or has a picture that cannot be read.
    """
    checkout()  # of the code that runs, whatever is committed meanwhile
    if next(iter(cells), None) != DENSE:
        raise ValueError(
            f"The first cell is {next(iter(cells), None)!r}: begin with {DENSE!r}, which keeps all tokens."
        )
    counts = {
        name: len(samples) if cell.limit is None else min(cell.limit, len(samples)) for name, cell in cells.items()
    }
    if not samples or max(counts.values()) > counts[DENSE]:
        raise ValueError("There are samples that are not made with all tokens: raise the limit of the dense cell.")
    measured = sorted(name if metric.model is None else f"{name}={metric.model}" for name, metric in metrics.items())
    settings = {**(about or {}), "seed": seed, "metrics": measured, "selection": selection_version()}
    settings["selection_beside"] = version_beside()
    configs = {
        name: {**settings, "samples": counts[name], "digest": _digest(samples[: counts[name]]), **cell.to_dict()}
        for name, cell in cells.items()
    }
    done = {name: _read_cell(folder / "cells" / f"{name}.json", configs[name]) for name in cells}
    names = [sample.name for sample in samples[: counts[DENSE]]]
    _check_names(names, list(cells))
    if not all((folder / DENSE / f"{name}.png").is_file() for name in names):
        done[DENSE] = None  # the others are compared with its pictures
    for name in cells if keep_outputs else ():
        if not all(output_of(folder, name, sample).is_file() for sample in names[: counts[name]]):
            done[name] = None
    if (last := seed + counts[DENSE] - 1) > LAST_SEED:
        raise ValueError(
            f"seed is {seed}, and that of the last of {counts[DENSE]} samples would be {last}: pass a seed of at most "
            f"{LAST_SEED - counts[DENSE] + 1}."
        )
    if any(rows is None for rows in done.values()):
        masked = [counts[n] for n, cell in cells.items() if done[n] is None and _asks_for_masks(cell.config)]
        phrased = [counts[n] for n, cell in cells.items() if done[n] is None and _asks_for_phrases(cell.config)]
        _check(samples[: counts[DENSE]], max(masked, default=0), max(phrased, default=0))
    remaining = sum(counts[name] for name, rows in done.items() if rows is None)
    with tqdm(total=remaining, unit="output", desc="evaluate", disable=not (remaining and bar)) as shown:
        for name, cell in cells.items():
            if done[name] is None:
                shown.set_postfix_str(name)
                rows, how = [], cell.make or make
                for i, sample in enumerate(samples[: counts[name]]):
                    try:
                        keeps = keep_outputs or i < SHOWN
                        rows.append(_run(how, sample, name, cell.config, metrics, folder, seed + i, keeps))
                    except (ValueError, GenerationError) as error:
                        kind = GenerationError if isinstance(error, GenerationError) else ValueError
                        raise kind(f"Sample {sample.name}, setting {name}: {error}") from error
                    shown.update()
                figures = {"samples": rows}
                write_result(folder / "cells" / f"{name}.json", f"evaluation of {name}", configs[name], figures)
                done[name] = rows
    config = {**settings, "cells": {name: cell.to_dict() for name, cell in cells.items()}}
    figures = summarise({name: rows for name, rows in done.items() if rows is not None})
    return write_result(folder / "result.json", "evaluation", config, figures)


def _check_names(samples: Sequence[str], settings: Sequence[str]) -> None:
    """Raise ValueError for names that no file can have, or that two would share."""
    for name in samples:
        size = len(name.encode("utf-8", "surrogatepass"))
        if size > LONGEST_NAME:
            raise ValueError(
                f"A sample's name has {size} bytes, and its pictures go by it: give it one of {LONGEST_NAME} at most "
                f"({name[:40]} ...)."
            )
        if advice := name_problem(name):
            raise ValueError(f"A sample is named {name!r}, which no file can be: {advice}.")
    for kind, each in (("samples", samples), ("settings", settings)):
        if twice := same_file(each):
            says = (
                repr(twice[0]) if twice[0] == twice[1] else f"{twice[0]!r} and {twice[1]!r}, one file on some systems"
            )
            raise ValueError(f"Two {kind} are named {says}: give each a name of its own.")


def output_of(folder: Path, setting: str, sample: str) -> Path:
    """Where the output of a sample is, if it stays."""
    return (folder / DENSE if setting == DENSE else folder / "shown" / setting) / f"{sample}.png"


def open_folder(folder: Path) -> None:
    """Make the output folder, or say before any work starts why it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder} cannot be a folder ({error.strerror}): choose another one.") from error
    check_output(folder / "curves.png")


def _check(samples: Sequence[Sample], masked: int, phrased: int) -> None:
    """Open every picture once, so that a bad one is named before any work is done; of the first `masked` also masks.
    The first `phrased` have to have phrases."""
    for i, sample in enumerate(tqdm(samples, unit="sample", desc="pictures", delay=2)):
        sample.open_references()
        sample.open_image()
        sample.open_mask()
        _subjects(sample)
        if i < masked:
            _oracle(sample)
        if i < phrased:
            _phrases(sample)


def _digest(samples: Sequence[Sample]) -> str:
    """What samples are told apart by: their text, and their pictures' bytes or paths and sizes."""
    digest = hashlib.sha256()
    for sample in samples:
        more = (sample.caption, sample.groups) if isinstance(sample, BenchmarkSample) else ()
        told = (sample.name, sample.prompt, sample.task, *sample.phrases, *more)
        digest.update(repr(told).encode("utf-8", "surrogatepass"))
        targets = [each for subject in getattr(sample, "targets", ()) for each in subject]
        for picture in (*sample.references, sample.image, sample.mask, *sample.reference_masks, *targets):
            size = picture.stat().st_size if isinstance(picture, Path) and picture.is_file() else None
            digest.update(repr((picture, size)).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


def _read_cell(path: Path, config: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The figures of a cell that was finished before, or None. Raises ValueError where they are of other settings."""
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        earlier, rows = dict(record["config"]), record["figures"]["samples"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} holds no figures of an evaluation: remove it, or give another folder.") from error
    now = json.loads(json.dumps(config))
    for key in sorted(earlier.keys() | now.keys()):
        if earlier.get(key) != now.get(key):
            if key == "digest":
                raise ValueError(f"{path} has figures of other samples: give another folder, or remove it.")
            raise ValueError(
                f"{path} is of {key} {earlier.get(key)!r} and not {now.get(key)!r}: give another folder, or remove it."
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
    keeps_picture: bool,
) -> dict[str, Any]:
    """Make one sample under one setting: its figures."""
    if _asks_for_phrases(config):
        config = replace(config, phrases=_phrases(sample))
    if _asks_for_masks(config):
        selector: Any = _oracle(sample)
        if isinstance(config.selector, Mapping):
            selector = {selector if part == "mask" else part: weight for part, weight in config.selector.items()}
        config = replace(config, selector=selector)
    generation = make(sample, replace(config, seed=seed), seed)
    output = generation.image.convert("RGB")
    path = output_of(folder, DENSE, sample.name)
    if name == DENSE:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_picture(output, path)
    dense = None if name == DENSE else open_picture(path)
    if keeps_picture and name != DENSE:
        place = folder / "shown" / name
        place.mkdir(parents=True, exist_ok=True)
        save_picture(output, place / f"{sample.name}.png")
        if generation.selection is not None:
            (place / "tokens").mkdir(exist_ok=True)
            save_picture(draw_selection(generation.selection, height=192), place / "tokens" / f"{sample.name}.png")
    tokens = (generation.selection.kept, generation.selection.total) if generation.selection else (0, 0)
    return {
        "name": sample.name,
        "task": sample.task,
        **({"groups": list(sample.groups)} if isinstance(sample, BenchmarkSample) and sample.groups else {}),
        "kept": tokens[0],
        "total": tokens[1],
        "seconds": round(generation.times.total, 4),
        "scores": dict(_scores(output, sample, dense, metrics)),
    }


def _subjects(sample: Sample) -> list[list[Image.Image]]:
    """What an output is compared with, where it is with what it shows: the pictures of each subject."""
    targets = sample.targets if isinstance(sample, BenchmarkSample) else ()
    if targets:
        return [[open_any(picture) for picture in subject] for subject in targets]
    return [[reference] for reference in sample.open_references()]


def _asks_for_masks(config: SparseContextConfig) -> bool:
    """Whether the sample's own masks decide, alone or in a blend."""
    return "mask" in config.selector if isinstance(config.selector, Mapping) else config.selector == "mask"


def _asks_for_phrases(config: SparseContextConfig) -> bool:
    """Whether the sample's own phrases decide, alone or in a blend."""
    text = None if config.selector is None else find_text(config.selector)  # type: ignore[arg-type]
    return text is not None and text.phrases is None and config.phrases is None


def _phrases(sample: Sample) -> tuple[str | None, ...]:
    """The sample's own phrases: None for a reference that it has none for."""
    if not sample.phrases:
        raise ValueError(
            f"The selector 'text' needs phrases, and the sample {sample.name} has none: add phrases, or leave this "
            "selector out."
        )
    return sample.phrases


def _oracle(sample: Sample) -> Any:
    """The selector that keeps what the sample's own masks of its references cover; all of one that has none."""
    masks = sample.open_reference_masks()
    if all(mask is None for mask in masks):
        raise ValueError(
            f"The selector 'mask' needs masks, and the sample {sample.name} has none: add reference_masks or pictures "
            "with transparency, or leave this selector out."
        )
    sizes = [picture.size for picture in sample.open_references()]
    return masks_of([Image.new("L", s, 255) if m is None else m for m, s in zip(masks, sizes, strict=True)])


def _scores(
    output: Image.Image, sample: Sample, dense: Image.Image | None, metrics: Mapping[str, Metric]
) -> Iterator[tuple[str, float | None]]:
    """The figures of one output, by name: None where there is nothing to compare with."""
    truth, mask = _fit(sample.open_image(), output), _fit(sample.open_mask(), output)
    kinds = {metric.against for metric in metrics.values()}
    references = sample.open_references() if kinds & {"source", "caption"} else []
    subjects = _subjects(sample) if "references" in kinds else []
    edited = None
    if any(metric.masked and metric.against in ("source", "prompt") for metric in metrics.values()):
        edited = _fit((sample.open_reference_masks() or [None])[0], output)
    for name, metric in metrics.items():
        function = partial(measure, name, metric.function)
        if metric.against == "references":
            means = [np.mean([function(output, each.convert("RGB"), None) for each in subject]) for subject in subjects]
            yield name, _number(np.mean(means))
        elif metric.against == "prompt":  # what the output shows, where the prompt says what to do instead
            text = sample.text if isinstance(sample, BenchmarkSample) else sample.prompt
            yield name, _number(function(output, text, edited if metric.masked else None))
        elif metric.against == "caption":
            assert isinstance(sample, BenchmarkSample)
            yield name, _number(function(references[0], sample.source_caption, None))
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


def _fit(picture: Image.Image | None, output: Image.Image) -> Image.Image | None:
    """A picture or mask in the size of the output."""
    if picture is None:
        return None
    picture = picture if picture.mode == "L" else picture.convert("RGB")
    return picture if picture.size == output.size else picture.resize(output.size, Image.Resampling.LANCZOS)


def _number(value: Any) -> float | None:
    return round(float(value), 6) if math.isfinite(value) else None
