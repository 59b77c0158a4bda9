"""Pictures of an evaluation: the curves, and the sheet of what was made. No display is needed."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..images import open_picture, save_picture
from ..preview import column, label, side_by_side
from ..samples import ILLEGAL, Sample, needs_datasets
from .grid import DENSE
from .metrics import Metric
from .networks import find_spec
from .report import SHOWN

GROUPS_A_ROW = 3


def check_matplotlib() -> None:
    """Raise ValueError where what draws the curves is not installed."""
    if find_spec("matplotlib") is None:
        raise ValueError("A plot needs matplotlib: pip install 'sparse-context[plots]'.")


def check_installed(metrics: Mapping[str, Metric], source: str | None) -> None:
    """Raise ValueError that names all that an evaluation needs and is not installed: for the curves, for each metric,
    and for reading the data."""
    needs = {"a plot": ["matplotlib"]}
    needs |= {f"the metric {name}": list(metric.packages) for name, metric in metrics.items()}
    if source is not None and needs_datasets(source):
        needs[f"reading {source}"] = ["datasets"]
    missing = {what: [name for name in packages if find_spec(name) is None] for what, packages in needs.items()}
    missing = {what: [name.replace("_", "-") for name in names] for what, names in missing.items() if names}
    if not missing:
        return
    reads = f"reading {source}" in missing
    extras = [*(["evaluate"] if len(missing) > reads else []), *(["train"] if reads else [])]
    said = ", ".join(f"{what} needs {' and '.join(names)}" for what, names in missing.items())
    raise ValueError(f"{said[0].upper()}{said[1:]}: pip install 'sparse-context[{','.join(extras)}]'.")


def lines_of(cells: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """The cells but the dense one, by what they share beside keep: {line: [cell, ...]}, most tokens first.

    cells: `config["cells"]` of a result. A line goes by its selector, and by task, overview, coverage and merge
    where these differ and were set.
    """
    fields = ("selector", "task", "overview", "overview_layout", "coverage", "merge", "share", "floor")
    settings = {
        name: tuple(str(cell.get(f) or None if f == "merge" else cell.get(f)) for f in fields)
        for name, cell in cells.items()
        if name != DENSE
    }
    telling = [i for i in range(len(fields)) if i == 0 or len({s[i] for s in settings.values()}) > 1]
    lines: dict[str, list[str]] = {}
    for name, setting in settings.items():
        text = ", ".join(setting[i] if i == 0 else f"{fields[i]} {setting[i]}" for i in telling if setting[i] != "None")
        lines.setdefault(text, []).append(name)
    return {line: sorted(names, key=lambda n: _sort_key(cells[n]["keep"])) for line, names in lines.items()}


def _sort_key(keep: Any) -> tuple[int, float]:
    return (0, -float(keep)) if isinstance(keep, (int, float)) else (1, 0.0)


def draw_curves(result: Mapping[str, Any], score: str, baseline: Mapping[str, Any] | None = None) -> Image.Image:
    """A score against the share of tokens kept: a panel for each group, a line for each selector.

    The dashed line is the mean with all tokens; a point is that plus the mean of the paired differences, and the band
    their 95 % interval. So settings that were run on fewer samples are comparable with the others. Distances to the
    dense output have no such difference: there a point is the mean. `before` is another result on the same samples,
    such as that of the weights before fine-tuning: dotted, without bands. Raises ValueError for a score that the result
    does not have, and without matplotlib.
    """
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = {
        name: cells
        for name, cells in result["figures"].items()
        if any(score in cell["scores"] for cell in cells.values())
    }
    if not groups:
        raise ValueError(f"The result has no score {score!r}.")
    columns = min(GROUPS_A_ROW, len(groups))
    rows = -(-len(groups) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.4 * rows + 0.6), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()
    lines = lines_of(result["config"]["cells"])
    drawn = {}
    for axis, (group, cells) in zip(axes, groups.items(), strict=False):
        dense = cells[DENSE]["scores"].get(score)
        if dense is not None:
            axis.axhline(dense["mean"], color="0.4", linestyle="--", linewidth=1)
        for i, (line, names) in enumerate(lines.items()):
            if baseline is not None and (points := _points(baseline["figures"].get(group, {}), names, score)):
                axis.plot(*list(zip(*points, strict=True))[:2], f"C{i}:", linewidth=1.2)
            if not (points := _points(cells, names, score)):
                continue
            kept, means, lows, highs = zip(*points, strict=True)
            (drawn[line],) = axis.plot(kept, means, f"C{i}o-", markersize=4, linewidth=1.5)
            axis.fill_between(kept, lows, highs, color=f"C{i}", alpha=0.15, linewidth=0)
        axis.set_xscale("log")
        shares = sorted({cell["kept"] for cell in cells.values() if cell["kept"]} | {1.0})
        ticks = [s for i, s in enumerate(shares) if i == 0 or s > 1.25 * shares[i - 1]]
        axis.set_xticks(ticks, [f"{s:.2g}" for s in ticks])
        axis.minorticks_off()
        axis.set_title(f"{group} (n = {max(c['samples'] for c in cells.values())})", fontsize=10)
        axis.grid(alpha=0.25)
    for axis in axes[len(groups) :]:
        axis.set_axis_off()
    figure.supxlabel("share of reference tokens kept", fontsize=10)
    figure.supylabel(score.replace("_", " "), fontsize=10)
    if drawn:
        figure.legend(drawn.values(), drawn.keys(), loc="outside upper center", ncols=min(6, len(drawn)), frameon=False)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def _points(cells: Mapping[str, Any], names: Sequence[str], score: str) -> list[tuple[float, float, float, float]]:
    """The points of one line in one panel, by the share kept: (kept, mean, low, high), the dense one included."""
    dense = cells[DENSE]["scores"].get(score) if DENSE in cells else None
    points = [
        (cells[n]["kept"], *level_of(cells[n]["scores"][score], dense))
        for n in names
        if n in cells and score in cells[n]["scores"] and cells[n]["kept"]
    ]
    if dense is not None:
        points.append((1.0, dense["mean"], dense["mean"], dense["mean"]))
    return sorted(points)


def level_of(entry: Mapping[str, Any], dense: Mapping[str, Any] | None) -> tuple[float, float, float]:
    """Where a setting is drawn, and its band: (mean, low, high)."""
    if dense is None or "difference" not in entry:
        return (entry["mean"], *(entry["interval"] or [entry["mean"]] * 2))
    middle = entry["difference"]
    low, high = entry["difference_interval"] or [middle] * 2
    return dense["mean"] + middle, dense["mean"] + low, dense["mean"] + high


def draw_sheet(folder: Path, samples: Sequence[Sample], cells: Sequence[str], height: int = 192) -> Image.Image:
    """The first samples of an evaluation in `folder`: the truth, the output with all tokens, and those of `cells`.

    Below the outputs of a sample are the tokens that were kept for each of them.

    Raises `PictureError` where a picture of the evaluation is missing.
    """
    rows = []
    for sample in samples[:SHOWN]:
        truth = sample.open_image()
        outputs = [] if truth is None else [label(_scaled(truth, height), "truth")]
        outputs.append(label(_scaled(open_picture(folder / DENSE / f"{sample.name}.png"), height), "all tokens"))
        tokens = []
        for name in cells:
            outputs.append(label(_scaled(open_picture(folder / "shown" / name / f"{sample.name}.png"), height), name))
            drawn = folder / "shown" / name / "tokens" / f"{sample.name}.png"
            if drawn.is_file():
                tokens.append(open_picture(drawn).convert("RGB"))
        rows.append(label(column([side_by_side(part) for part in (outputs, tokens) if part]), sample.prompt))
    return column(rows, gap=20)


def _scaled(picture: Image.Image, height: int) -> Image.Image:
    width = max(1, round(picture.width * height / picture.height))
    return picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)


def draw_all(result: Mapping[str, Any], folder: Path, samples: Sequence[Sample]) -> list[Path]:
    """Write the curves of every score and a sheet for every selector into `folder`; the paths."""
    cells = result["config"]["cells"]
    scores = dict.fromkeys(s for group in result["figures"].values() for cell in group.values() for s in cell["scores"])
    lines = lines_of(cells)
    written = []
    for score in scores if lines else ():
        written.append(folder / f"curves-{score}.png")
        save_picture(draw_curves(result, score), written[-1])
    for line, names in lines.items():
        pictured = [n for n in names if cells[n]["limit"] is None or cells[n]["limit"] >= min(SHOWN, len(samples))]
        if pictured:
            written.append(folder / f"sheet-{re.sub(ILLEGAL, '_', line)}.png")
            save_picture(draw_sheet(folder, samples, pictured), written[-1])
    return written
