"""Means over samples, and how sure they are."""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from .grid import DENSE


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
    """Groups of samples ("all", and others where samples differ in them), in them the cells, and in these their scores.

    A score has `n` samples, their `mean` and its `interval`; and, paired with the dense cell over the samples that both
    have, `difference` (cell minus dense) and `difference_interval`. Intervals are of 95 %, None with fewer than two.
    """
    held = {_groups(row) for row in cells[DENSE]}
    found = dict.fromkeys(group for row in cells[DENSE] for group in _groups(row))
    named = [group for group in found if group != "all"] if len(held) > 1 else []
    groups: dict[str, Any] = {}
    for group in ["all", *named]:
        groups[group] = {}
        for name, rows in cells.items():
            inside = [row for row in rows if group == "all" or group in _groups(row)]
            if inside:
                dense = {row["name"]: row["scores"] for row in cells[DENSE]}
                groups[group][name] = _summary(inside, dense)
    return groups


def _groups(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The groups that a sample is in: those of its benchmark, or its task."""
    return tuple(row.get("groups") or ([] if row["task"] is None else [row["task"]]))


def _summary(rows: list[dict[str, Any]], dense: Mapping[str, Mapping[str, float | None]]) -> dict[str, Any]:
    shares = [row["kept"] / row["total"] for row in rows if row["total"]]
    scores: dict[str, Any] = {}
    for score in dict.fromkeys(score for row in rows for score in row["scores"]):
        values = {row["name"]: row["scores"].get(score) for row in rows}
        there = {sample: value for sample, value in values.items() if value is not None}
        if not there:
            continue
        reference = {sample: dense[sample].get(score) for sample in there}
        pairs = [there[sample] - value for sample, value in reference.items() if value is not None]
        scores[score] = {"n": len(there), **_mean(list(there.values()), "mean", "interval")}
        if pairs:
            scores[score] |= _mean(pairs, "difference", "difference_interval")
    seconds = float(np.median([row["seconds"] for row in rows]))
    return {
        "samples": len(rows),
        "kept": round(float(np.mean(shares)), 4) if shares else None,
        "median_seconds": round(seconds, 4),
        "scores": scores,
    }


def _mean(values: list[float], name: str, interval: str) -> dict[str, Any]:
    low, high = bootstrap_interval(values)
    return {
        name: round(float(np.mean(values)), 6),
        interval: None if math.isnan(low) else [round(low, 6), round(high, 6)],
    }
