"""Validation pictures of a run."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image
from torch import nn

from ..config import SparseContextConfig
from ..families.host import Host
from ..pipelines.engine import Engine
from ..pipelines.spec import Request
from ..preview import column, label, side_by_side
from ..sparsify import remove_sparse_context
from .config import TrainConfig
from .data import Example


@contextlib.contextmanager
def evaluating(transformer: nn.Module) -> Iterator[None]:
    """The transformer in evaluation mode inside, and in training mode again afterwards."""
    transformer.eval()
    try:
        yield
    finally:
        transformer.train()


SHEET_SIDE = 16_383
"""Pixels that a side of a validation picture may have, in webp. A larger one is scaled down, for no run ends by it."""


def validation_request(example: Example, pipe: Any, keep: float) -> Request:
    """What a picture of an example asks of the pipeline."""
    token = 2 * pipe.vae_scale_factor
    width, height = (side // token * token for side in example.image.size)
    return Request(example.prompt, example.references, SparseContextConfig(keep=keep), height=height, width=width)


def draw_validation(host: Host, examples: Sequence[Example], config: TrainConfig) -> Image.Image:
    """For each example one row: its references, the truth, the dense and the sparse output, from the same noise.

    The sparse one has an overview where these weights are trained for it, as it has by default at inference.
    """
    rows = []
    pipe = host.pipe
    engine = Engine(pipe=pipe)
    quiet = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(disable=True)
    try:
        for example in examples:
            outputs = []
            for keep in (1.0, config.validation_keep):
                result = engine(validation_request(example, pipe, keep))
                overviews = result.selection.overviews.values() if result.selection else ()
                by = " or ".join(dict.fromkeys(str(overview.factor) for overview in overviews))
                kept = "all tokens" if keep == 1 else f"keep {keep:g}"
                outputs.append(label(result.image, f"{kept}, overview by {by}" if by else kept))
            rows.append(side_by_side([*example.references, label(example.image, "truth"), *outputs]))
    finally:
        remove_sparse_context(pipe)
        pipe.set_progress_bar_config(**quiet)
    sheet = column(rows)
    sheet.thumbnail((SHEET_SIDE, SHEET_SIDE))
    return sheet
