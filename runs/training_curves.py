"""The curves of training runs on one picture: the loss, and the gates that a run was measured at, in dB.

    python runs/training_curves.py                                      # of results/overview_runs, for the documents
    python runs/training_curves.py RUN_FOLDER... --output FILE.webp     # of other runs

A run's folder holds `log.jsonl`, with a record every so many steps (`training/loop.py`). It may hold `gates.jsonl`,
with a record {"step": ..., "psnr": {gate: {group: dB}}} of each time that it was measured. What was measured once and
no more, such as the model before training, is a dashed line. A table says where each run is. Runs may go on meanwhile.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tables import RESULTS, table
from tables import draw as draw_tables

from sparse_context.evaluation.plots import check_matplotlib
from sparse_context.images import save_picture

RUNS = RESULTS / "overview_runs"
PICTURE = RESULTS.parent / "docs" / "images" / "training-curves.webp"
COLUMNS = 3  # of panels
SMOOTHED = 10  # records, over which the loss is averaged
LINES = ("-", "--", ":", "-.")  # by run, in panels that show several
MARKERS = ("o", "P", "s", "^", "D", "v", "X")  # the same

Curve = list[tuple[int, float]]
"""Steps, and what was measured there."""


class Course(NamedTuple):
    """What the folder of a run says. log: its records. gates: by group and gate."""

    name: str
    log: list[dict[str, Any]]
    gates: dict[str, dict[str, Curve]]


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The whole records of a file, of which the last may be half written; none where there is no file."""
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n") and line.strip()]


def read_run(folder: Path) -> Course:
    """Raises ValueError for a folder without a log. What was measured twice at a step counts once, as it was last."""
    log = read_lines(folder / "log.jsonl")
    if not log:
        raise ValueError(f"{folder} holds no log.jsonl with a record: name the folder of a run.")
    found: dict[str, dict[str, dict[int, float]]] = {}
    for record in read_lines(folder / "gates.jsonl"):
        for gate, groups in record["psnr"].items():
            for group, level in groups.items():
                found.setdefault(group, {}).setdefault(gate, {})[record["step"]] = level
    gates = {group: {gate: sorted(at.items()) for gate, at in each.items()} for group, each in found.items()}
    return Course(folder.name, log, gates)


def smoothed(values: Sequence[float], over: int = SMOOTHED) -> np.ndarray:
    """The mean of each value and those before it, `over` in all."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - over, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def draw(runs: Sequence[Course]) -> Image.Image:
    """A panel of the losses, and one for each group of gates: a colour for each gate, a kind of line for each run."""
    check_matplotlib()
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = list(dict.fromkeys(group for run in runs for group in run.gates))
    gates = list(dict.fromkeys(gate for run in runs for each in run.gates.values() for gate in each))
    colours = colormaps["tab10" if len(gates) <= 10 else "tab20"].colors
    columns = min(COLUMNS, 1 + len(groups))
    rows = -(-(1 + len(groups)) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.4 * rows + 0.6), dpi=105, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for number, run in enumerate(runs):
        steps, losses = zip(*((record["step"], record["loss"]) for record in run.log), strict=True)
        axes[0].plot(steps, losses, f"C{number}", alpha=0.2, linewidth=0.8)
        axes[0].plot(steps, smoothed(losses), f"C{number}", linewidth=1.5, label=run.name)
    axes[0].set_yscale("log")
    axes[0].set_title("loss", fontsize=10)
    axes[0].legend(fontsize=8, frameon=False)
    drawn: dict[str, Any] = {}
    for axis, group in zip(axes[1:], groups, strict=False):
        for number, run in enumerate(runs):
            for gate, curve in run.gates.get(group, {}).items():
                colour = colours[gates.index(gate) % len(colours)]
                last_gate = max(each[-1][0] for each in run.gates[group].values())
                if len(curve) == 1 and curve[0][0] < last_gate:
                    line = axis.axhline(curve[0][1], color=colour, linestyle="--", linewidth=1)
                else:
                    style = MARKERS[number % len(MARKERS)] + LINES[number % len(LINES)]
                    (line,) = axis.plot(*zip(*curve, strict=True), style, color=colour, markersize=4, linewidth=1.5)
                drawn.setdefault(gate, line)
        axis.set_title(f"{group}, dB", fontsize=10)
    last = max(run.log[-1]["step"] for run in runs)
    for axis in axes[: 1 + len(groups)]:
        axis.set_xlim(0, 1.02 * last)
        axis.grid(alpha=0.25)
        axis.set_xlabel("steps", fontsize=9)
    for axis in axes[1 + len(groups) :]:
        axis.set_axis_off()
    if drawn:
        figure.legend(drawn.values(), drawn.keys(), loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def course_table(runs: Sequence[Course]) -> str:
    """How far each run is, and below it what its gates said last, with the step where that was."""
    far = [
        [run.name, f"{run.log[-1]['step']:,}", f"{smoothed([record['loss'] for record in run.log])[-1]:.4f}"]
        for run in runs
    ]
    parts = [table(["run", "steps", f"loss, mean of {SMOOTHED} records"], far)]
    groups = list(dict.fromkeys(group for run in runs for group in run.gates))
    if groups:
        rows = []
        for run in runs:
            for gate in dict.fromkeys(gate for each in run.gates.values() for gate in each):
                last = [run.gates.get(group, {}).get(gate, [None])[-1] for group in groups]
                rows.append([run.name, gate, *("" if at is None else f"{at[1]:.1f} ({at[0]:,})" for at in last)])
        parts.append(table(["run", "gate", *(f"{group}, dB (step)" for group in groups)], rows))
    return "\n\n".join(parts)


def training_curves() -> str:
    """Where the runs of results/ are."""
    return course_table(published_runs())


def published_runs() -> list[Course]:
    return [read_run(log.parent) for log in sorted(RUNS.glob("*/log.jsonl"))]


TABLES = {
    "training_curves": training_curves,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="The curves of training runs, and where each is.")
    parser.add_argument("folders", nargs="*", type=Path, metavar="RUN_FOLDER", help="default: those of results/")
    parser.add_argument("--output", type=Path, default=PICTURE, help="the picture, .webp or .png")
    parser.add_argument("--table", action="store_true", help="only draw the table of results/ again")
    arguments = parser.parse_args()
    if arguments.folders and arguments.output == PICTURE:
        parser.error("name an --output for runs other than those of results/")
    if not arguments.table:
        runs = [read_run(folder) for folder in arguments.folders] or published_runs()
        save_picture(draw(runs), arguments.output)
        print(course_table(runs))
    if not arguments.folders:
        draw_tables(TABLES)


if __name__ == "__main__":
    main()
