"""Pictures of runs/overview.py: the curves, and for each group of scenes a page that shows where it fails."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from overview_ways import CHOSEN, MASKED, WITHOUT
from PIL import Image
from tables import SCORES

from sparse_context.config import SparseContextConfig
from sparse_context.evaluation.grid import DENSE, Maker
from sparse_context.evaluation.plots import draw_curves
from sparse_context.images import open_picture, save_picture
from sparse_context.preview import column, draw_selection, label, side_by_side
from sparse_context.samples import Sample

TILE = 192  # pixels
LINES = (*WITHOUT, "overview alone", CHOSEN, MASKED)

Rows = Mapping[str, Sequence[Mapping[str, Any]]]
"""The figures of each scene by setting, as `evaluate` has them."""


def save_curves(figures: Mapping[str, Any], folder: Path) -> None:
    """Each score against the share of tokens kept: a panel for each group, a line for each of `LINES`.

    figures: by group and setting, "WAY KEEP".
    """
    cells: dict[str, Any] = {DENSE: {}}
    for name in dict.fromkeys(name for settings in figures.values() for name in settings):
        way, _, keep = name.rpartition(" ")
        line = "overview alone" if way.endswith(" alone") else way
        if line in LINES:
            cells[name] = {"selector": line, "keep": float(keep)}
    groups = {group: figures[group] for group in SCORES if group in figures}
    for score in dict.fromkeys(SCORES.values()):
        picture = draw_curves({"config": {"cells": cells}, "figures": groups}, score)
        save_picture(picture, folder / f"curves-{score}.webp")


def save_pages(
    samples: Sequence[Sample],
    rows: Rows,
    makers: Mapping[str, tuple[Maker, SparseContextConfig, str]],
    dense: Path,
    folder: Path,
    most: int,
) -> None:
    """A page for each group: the `most` scenes that the last of `makers` loses most of, the worst first.

    makers: by what is said of them how a picture is made, its config, and the setting in `rows`, whose pictures are
    made again with its noise. dense: the folder of the outputs with all tokens.
    """
    for group, of in SCORES.items():
        scores = {
            setting: {row["name"]: row["scores"][of] for row in found if row["task"] == group}
            for setting, found in rows.items()
        }
        last = [*makers.values()][-1][2]
        if last not in rows:
            continue
        lost = {name: score - scores[DENSE][name] for name, score in scores[last].items()}
        worst = sorted(lost, key=lambda name: lost[name])[:most]
        if worst:
            numbered = {sample.name: (i, sample) for i, sample in enumerate(samples)}
            page = column([_scene(*numbered[name], scores, makers, dense) for name in worst], gap=20)
            save_picture(page, folder / f"{group.replace(' ', '-')}.webp")


def _scene(
    number: int,
    sample: Sample,
    scores: Mapping[str, Mapping[str, float]],
    makers: Mapping[str, tuple[Maker, SparseContextConfig, str]],
    dense: Path,
) -> Image.Image:
    """What was kept by the last of the makers, the output with all tokens, those of the makers, and the truth."""
    outputs = [_tile(open_picture(dense / f"{sample.name}.png"), f"all tokens, {scores[DENSE][sample.name]:.1f} dB")]
    for said, (make, config, setting) in makers.items():
        generation = make(sample, replace(config, seed=number), number)
        outputs.append(_tile(generation.image, f"{said}, {scores[setting][sample.name]:.1f} dB"))
    truth = sample.open_image()
    assert truth is not None and generation.selection is not None
    kept = draw_selection(generation.selection, height=TILE)
    return label(side_by_side([kept, *outputs, _tile(truth, "truth")]), f"{sample.prompt} ({sample.name})")


def _tile(picture: Image.Image, text: str) -> Image.Image:
    return label(picture.convert("RGB").resize((TILE, TILE), Image.Resampling.LANCZOS), text)
