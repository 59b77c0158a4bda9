"""`sparse-context demo`: the embedded model on images that it has not seen."""

from pathlib import Path
from typing import Annotated

import typer

from . import options


def demo(
    output: Annotated[Path, typer.Option(help="Folder for the images.")] = Path("demo"),
    keep: Annotated[
        str | None,
        typer.Option(help="Ratio, count or auto.", show_default="half of edits in place, a fifth of the rest"),
    ] = None,
) -> None:
    """Run the embedded model on unseen images: kept tokens, dense, sparse and KV outputs, and their times."""
    from ..embedded.demo import run_demo, table

    options.hide_loading_bars()
    report = run_demo(output, None if keep is None else options.read_keep(keep))
    print(table(report))
    print(f"wrote {output / 'demo.png'}, a sheet for each scene and report.json")
