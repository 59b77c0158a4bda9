"""The models of ComfyUI that take reference latents, and where the tokens of overviews lie in each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sparse_context.overview import Overview, ids_at, overview_ids
from sparse_context.selectors.cells import Grid


@dataclass(frozen=True)
class Family:
    """One kind of model.

    mark: how far the position ids of an overview lie behind those of its reference, on the first axis, for each
    doubling of its factor. whole: they are whole numbers, and lie as far apart as there are references, if these are
    more than `mark`. packed: a latent's channels hold 2 x 2 places.
    """

    mark: float
    whole: bool = False
    packed: bool = False


FAMILIES: dict[str, Family] = {
    "flux2": Family(mark=1.0, packed=True),
    "flux": Family(mark=0.5),
    "qwen_image": Family(mark=4, whole=True),
}
"""By ComfyUI's name of the model. The marks are those that the trainer has (`sparse_context.families.*.drop`)."""


def place_overviews(
    ids: torch.Tensor, grids: Sequence[Grid], overviews: Sequence[Overview | None], family: Family
) -> torch.Tensor:
    """Position ids (B, N, A) of references and then of their overviews, with those of overviews where they belong.

    An overview that is laid out as a further reference has the ids that the model gave it. One that is spread lies over
    its reference's grid. grids: of the references. overviews: one for each, or None.
    """
    whole = ids.split([rows * columns for rows, columns in grids] + [each.tokens for each in overviews if each], dim=1)
    behind = iter(whole[len(grids) :])
    placed = list(whole[: len(grids)])
    for own, grid, each in zip(whole, grids, overviews, strict=False):
        if each is not None:
            native = next(behind)
            placed.append(native if each.layout != "spread" else _spread(own, grid, each, family, len(grids)))
    return torch.cat([part.float() for part in placed], dim=1)


def _spread(ids: torch.Tensor, grid: Grid, overview: Overview, family: Family, references: int) -> torch.Tensor:
    if not family.whole:
        return overview_ids(ids, grid, overview.factor, (0, family.mark))
    before = (overview.factor - 1) // 2
    row, column = (
        (torch.arange(coarse, device=ids.device) * overview.factor + before).clamp(max=count - 1)
        for coarse, count in zip(overview.grid, grid, strict=True)
    )
    spread = ids_at(ids, grid, row, column)
    spread[..., 0] += max(family.mark, references) * round(math.log2(overview.factor))
    return spread
