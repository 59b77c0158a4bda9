"""`sparse-context select`: what would be kept, drawn."""

import json
from pathlib import Path
from typing import Annotated

import typer

from . import options


def select(
    images: Annotated[list[Path], typer.Argument(help="Reference images.")],
    keep: options.Keep = None,
    selector: options.Selector = None,
    task: options.Task = None,
    mask: options.Mask = None,
    phrases: options.Phrases = None,
    text_model: options.TextModel = None,
    overview: options.Overview = None,
    overview_layout: options.OverviewLayout = None,
    coverage: options.Coverage = None,
    merge: options.Merge = 0.0,
    share: options.Share = "equal",
    floor: options.Floor = 1,
    token: Annotated[
        int,
        typer.Option(
            help="Side of a token in pixels: 16 for FLUX, 8 for the embedded model (which scales its references).",
        ),
    ] = 16,
    output: Annotated[Path, typer.Option(help="Output file for the drawing.")] = Path("tokens.png"),
    as_json: options.AsJson = False,
) -> None:
    """Show which tokens would be kept, without loading a model."""
    from ..images import open_picture, save_picture
    from ..preview import draw_selection, select_pictures

    if not 1 <= token <= 256:
        raise ValueError(f"token is {token}: pass its side in pixels, from 1 to 256.")
    options.check_outputs([output], [*images, *(mask or [])])
    references = [open_picture(path) for path in images]
    config = options.selection_config(
        keep,
        selector,
        mask,
        references,
        overview,
        overview_layout=overview_layout,
        task=task,
        phrases=phrases,
        text_model=text_model,
        coverage=coverage,
        merge=merge,
        share=share,
        floor=floor,
    )
    selection = select_pictures(references, config, token)
    save_picture(draw_selection(selection), output)
    print(json.dumps(selection.to_dict(), indent=2) if as_json else f"{selection}\nwrote {output}")
