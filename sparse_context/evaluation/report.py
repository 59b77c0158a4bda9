"""An evaluation as a table."""

from collections.abc import Mapping
from typing import Any

from .grid import DENSE

SHOWN = 6
"""How many samples' pictures are kept for the contact sheets."""


def table(result: Mapping[str, Any]) -> str:
    """The result as lines of text: a block for each group, a line for each cell, means and differences to dense."""
    lines = []
    for group, cells in result["figures"].items():
        scores = list(dict.fromkeys(score for cell in cells.values() for score in cell["scores"]))
        lines.append(f"{group}: {cells[DENSE]['samples']} samples")
        width = max(len(name) for name in cells) + 2
        lines.append(" " * width + f"{'kept':>8}" + "".join(f"{score:>{_width(score)}}" for score in scores))
        for name, cell in cells.items():
            kept = "" if cell["kept"] is None else f"{100 * cell['kept']:.1f} %"
            line = f"{name:<{width}}{kept:>8}"
            for score in scores:
                line += f"{_show(cell['scores'].get(score), name == DENSE):>{_width(score)}}"
            lines.append(line)
    return "\n".join(lines)


def _width(score: str) -> int:
    return max(len(score) + 2, 18)


def _show(entry: Mapping[str, Any] | None, dense: bool) -> str:
    if entry is None:
        return "-"
    difference = "" if dense or "difference" not in entry else f" ({entry['difference']:+.3g})"
    return f"{entry['mean']:.4g}{difference}"
