"""What runs on the held-out scenes of the embedded model share."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tables import SCORES

from recipes.mini.samples import tasks_of
from sparse_context.evaluation.grid import Maker, maker


def scene_maker(pipe: Any, scenes: Mapping[str, tuple], **settings: Any) -> Maker:
    """How `evaluate` makes a scene with `pipe`: with the tasks of its references, and without bars of progress.

    scenes: as `scene_samples` gives them. settings: further ones of `maker`.
    """
    pipe.set_progress_bar_config(disable=True)
    return maker(pipe, task_of=lambda sample: tasks_of(scenes[sample.name][0]), **settings)


def cell_rows(folder: Path, cell: str) -> list[dict]:
    """The figures of every sample of a cell that `evaluate` wrote into `folder`."""
    return json.loads((folder / "cells" / f"{cell}.json").read_text(encoding="utf-8"))["figures"]["samples"]


def gain(entry: Mapping[str, Any], group: str) -> str:
    """How many decibels a setting gains over dense, by the score that counts in the group."""
    return f"{entry['scores'][SCORES.get(group, 'psnr_in_mask')]['difference']:+.2f}"


def print_gains(figures: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """Print what every setting gains, a line for each group."""
    for group, settings in figures.items():
        print(f"{group}: {'; '.join(f'{name} {gain(entry, group)}' for name, entry in settings.items())}")
