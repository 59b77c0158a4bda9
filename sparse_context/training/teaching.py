"""Attention heads are taught where to look, in samples that say which reference token each output token shows.

A model that never saw two scales learns slowly from the flow-matching loss alone what an overview is for: nothing pulls
a head to the token that covers a place until it already looks there.
"""

from collections.abc import Sequence

import numpy as np
import torch

from ..overview import overview_grid
from ..selectors.cells import Grid
from .batch import TokenSet


def wanted_tokens(source: torch.Tensor, grids: Sequence[Grid], kept: TokenSet) -> torch.Tensor:
    """Where output tokens are to look among the tokens of a set, int64 like `source`; -1: at none of them.

    source: the token of the whole references, with these grids, that each shows, -1 for none. It is looked at itself
    where it is sharp (or in an average), else the overview token that covers it.
    """
    starts = np.cumsum([0] + [rows * columns for rows, columns in grids])
    place = np.full(starts[-1] + 1, -1)  # the last is that of no source
    behind = len(kept.index)
    for i, overview in kept.overviews.items():
        row, column = np.indices(grids[i]) // overview.factor
        place[starts[i] : starts[i + 1]] = (behind + row * overview_grid(grids[i], overview.factor)[1] + column).ravel()
        behind += overview.tokens
    place[kept.index] = np.arange(len(kept.index))
    if kept.into is not None:
        averaged = np.flatnonzero(kept.into >= 0)
        place[averaged] = place[kept.into[averaged]]
    return torch.from_numpy(place).to(source.device)[source]


def looking_loss(looks: Sequence[torch.Tensor], source: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of where heads look, the mean over `looks` (`families.host.Looks`).

    source, wanted: int64 (B, output tokens), as in `wanted_tokens`. Output tokens that are to look at a reference token
    weigh as much, together, as those that are to look at none. Samples of which no source is known teach nothing.
    """
    sees = wanted >= 0
    bare = (source >= 0).any(1, keepdim=True) & ~sees
    losses = []
    for look in looks:
        entropy = -look.gather(-1, (wanted + 1).unsqueeze(-1)).squeeze(-1)  # the first is that of no reference
        losses += [(entropy * part).sum() / part.sum().clamp(min=1) for part in (sees, bare)]
    return torch.stack(losses).sum() / len(looks)
