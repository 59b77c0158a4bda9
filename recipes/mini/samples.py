"""Scenes that the embedded model has not seen, as samples for evaluation.

Objects are split by base shape (data.py). What is tuned is tuned on "validation"; "test" is for what is published.
"""

import io
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from sparse_context.samples import Sample

from .data import Assets
from .scenes import GLOBAL_EDITS, SIZE, Scene, make_scene

FIRST_SEED = {"validation": 10_000, "test": 20_000}

GROUPS: Mapping[str, tuple[str, ...]] = {
    "subjects": ("subject_place", "subject_pair", "subject_scene", "subject_quarters"),
    "edits": ("edit_background", "edit_object", "edit_named"),
    "global edits": ("edit_global",),
}
"""What counts together. No truth follows from `edit_remove`, and `subject_scale` is one training scene in a hundred.
`edit_named`, which the shipped base was not trained on, has no turn below."""

TURNS = (
    "subject_place",
    "edit_background",
    "subject_pair",
    "edit_global",
    "subject_scene",
    "edit_object",
    "subject_quarters",
    "edit_global",
)
"""Eight scenes in a row: four of subjects, two of edits, two of global edits."""


def scene_samples(
    assets: Assets, count: int, first: int, turns: Sequence[str] = TURNS
) -> tuple[list[Sample], dict[str, tuple[Scene, str, int]]]:
    """`count` scenes as samples, their kinds in `turns`: and for each sample's name its (scene, kind, seed).

    assets: of one split (`Assets.split`). turns: of the kinds in `GROUPS`. The scenes of a kind have the seeds `first`
    and on. Pictures are PNG, so that not a value is lost.
    """
    group = {kind: name for name, kinds in GROUPS.items() for kind in kinds}
    drawn: Counter[str] = Counter()
    samples, scenes = [], {}
    for i in range(count):
        kind = turns[i % len(turns)]
        seed = first + drawn[kind]
        drawn[kind] += 1
        scene = make_scene(assets, kind, seed)
        mask, *reference_masks = (
            _png(np.rint(255 * np.clip(each, 0, 1)).astype(np.uint8)) for each in (scene.mask, *scene.reference_masks)
        )
        sample = Sample(
            name=f"{i:04}-{scene.task}-{seed}",
            prompt=scene.prompt,
            references=tuple(_png(picture) for picture in scene.references),
            image=_png(scene.target),
            mask=mask,
            reference_masks=tuple(reference_masks),
            task=group[kind],
        )
        samples.append(sample)
        scenes[sample.name] = (scene, kind, seed)
    return samples, scenes


def tasks_of(scene: Scene) -> list[str]:
    """The task of each reference: what has the output's size stays where it is, edited in part or as a whole."""
    if scene.task.removeprefix("edit_") in GLOBAL_EDITS:
        return ["global"]
    return ["edit" if picture.shape[:2] == (SIZE, SIZE) else "subject" for picture in scene.references]


def _png(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "png")
    return file.getvalue()
