"""The ways of runs/overview.py to spend a budget, each a name, and what is chosen among them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
from tables import SCORES, score_of

from sparse_context.config import SparseContextConfig
from sparse_context.evaluation.grid import Cell, Maker
from sparse_context.pipelines.engine import Generation
from sparse_context.samples import Sample
from sparse_context.selectors import SELECTORS, Grid
from sparse_context.selectors.cells import cell_means
from sparse_context.selectors.residual import Residual

WITHOUT = ("dropping", "random", "merged", "downscaled")
"""Without an overview, by the weights for dropping: what the tasks choose, tokens by chance, what the tasks choose as
averages, smaller pictures."""
SAME_WEIGHTS = "dropping, same weights"
"""`dropping` by the weights that know overviews."""
CHOSEN = "overview and sharp"
"""The overview and the rule that were chosen for a scene's group."""
DEFAULT = "default"
"""What `lora="overview"` gives whoever names nothing but a keep."""
RULES = ("residual", "residual x saliency", "residual x subject", "residual + subject", "subject")
"""What chooses the sharp tokens beside an overview."""
TRUE_MASK = "residual x true mask"
MASKED = "dropping, true mask"
LEAST = 0.1  # of its residual, what a token counts that shows nothing of an object


def ways_at(keep: float, factors: Sequence[int], rules: Sequence[str]) -> list[str]:
    """The overviews that a keep holds: "overview FACTOR alone" if that fills it, else "overview FACTOR, RULE"."""
    ways = []
    for factor in factors:
        alone = factor**-2
        if np.isclose(keep, alone):
            ways.append(f"overview {factor} alone")
        elif keep > alone:
            ways += [f"overview {factor}, {rule}" for rule in rules]
    return ways


def config_of(way: str, keep: float, layout: str | None = None) -> SparseContextConfig:
    """The settings of a way."""
    if way.startswith("overview "):
        name, _, rule = way.partition(", ")
        factor = int(name.split()[1])
        selector = selector_of(rule, factor) if rule else None
        return SparseContextConfig(keep=keep, selector=selector, overview=factor, overview_layout=layout)
    if way == DEFAULT:
        return SparseContextConfig(keep=keep)
    selector = {"random": "random", MASKED: "mask"}.get(way)
    return SparseContextConfig(keep=keep, selector=selector, merge=1.0 if way == "merged" else 0.0, overview=None)


def selector_of(rule: str, factor: int, mask: np.ndarray | None = None) -> Any:
    """What scores the sharp tokens beside an overview of `factor`. mask: for `TRUE_MASK`, uint8 (H, W)."""
    if " + " in rule:
        return dict.fromkeys(rule.split(" + "), 0.5)
    _, times, where = rule.partition(" x ")
    if not times:
        return rule
    residual = Residual(factor)

    def score(image: np.ndarray, grid: Grid, generator: np.random.Generator) -> np.ndarray:
        share = SELECTORS[where](image, grid, generator) if mask is None else cell_means(mask, grid) / 255
        return residual(image, grid, generator) * (LEAST + share) / (LEAST + 1)

    score.__name__ = rule
    return score


def with_masks(make: Maker) -> Maker:
    """`make`, with the residual inside the sample's own masks as its selector."""

    def made(sample: Sample, config: SparseContextConfig, seed: int) -> Generation:
        masks = [np.asarray(mask) for mask in sample.open_reference_masks()]
        selectors = [selector_of(TRUE_MASK, cast("int", config.overview), mask) for mask in masks]
        return make(sample, replace(config, selector=selectors, coverage=0.0), seed)

    return made


def by_group(make: Maker, chosen: Mapping[str, Mapping[str, str]], layout: str | None) -> Maker:
    """`make`, with what was chosen for the sample's group at the keep: {group: {keep: way}}."""

    def made(sample: Sample, config: SparseContextConfig, seed: int) -> Generation:
        keep = cast("float", config.keep)
        way = chosen[cast("str", sample.task)][f"{keep:g}"]
        return make(sample, replace(config_of(way, keep, layout), seed=config.seed), seed)

    return made


def choose(figures: Mapping[str, Any], cells: Mapping[str, Cell]) -> dict[str, dict[str, str]]:
    """The best overview of each group at each keep, by the mean of the group's score: {group: {keep: way}}.

    figures: of the cells, by group. True masks are no choice.
    """
    best: dict[str, dict[str, tuple[float, str]]] = {}
    for group, of in SCORES.items():
        for name, cell in cells.items():
            way = str(cell.about.get("way"))
            entry = score_of(figures.get(group, {}), name, of)
            if entry and way.startswith("overview ") and TRUE_MASK not in way:
                found, keep = best.setdefault(group, {}), f"{cell.config.keep:g}"
                found[keep] = max(found.get(keep, (-np.inf, "")), (entry["difference"], way))
    return {group: {keep: way for keep, (_, way) in found.items()} for group, found in best.items()}
