"""What a benchmark measured: compared, as a table, as a picture."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from ..evaluation.plots import check_matplotlib
from ..families.shape import Shape
from ..images import save_picture
from .figures import Figures, Measurement, Row, Spread
from .flops import call_flops
from .methods import METHODS


def read_quality(path: Path) -> list[dict[str, Any]]:
    """Known quality from a JSON list of {"method", "keep", "references", "value", "metric"}; raises ValueError."""
    names: dict[str, Any] = {
        "method": str,
        "keep": int | float | None,
        "references": int,
        "value": int | float,
        "metric": str,
    }
    wanted = f"pass a JSON list of {{{', '.join(sorted(names))}}}"
    if not path.is_file():
        raise ValueError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}: {wanted}.")
    try:
        points = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(points, list) or not all(
            isinstance(p, dict) and all(name in p and isinstance(p[name], kind) for name, kind in names.items())
            for p in points
        ):
            raise ValueError("it is no list of points")
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): make it readable.") from error
    except ValueError as error:
        raise ValueError(f"{path} holds no quality figures: {wanted}.") from error
    return points


def compare(measurements: Sequence[Measurement], shape: Shape) -> list[Row]:
    """What was timed, with medians, ratios to dense and what FLOPs allow."""
    rows = []
    for timed in measurements:
        setting = timed.setting
        alike = {
            each.setting.method: each
            for each in measurements
            if (each.setting.size, each.setting.references) == (setting.size, setting.references)
        }
        base, ceiling = alike["dense"], alike.get("no_references")
        speedup = {p: _ratios(base, timed, p) for p in ("total", "denoise") if p in timed.seconds}
        allowed = _flops(base, shape) / _flops(timed, shape)
        reached = speedup["denoise"].median
        share_of_ceiling = None
        if ceiling is not None:
            share_of_ceiling = round(reached / _ratios(base, ceiling, "denoise").median, 3)
        rows.append(
            Row(
                **asdict(setting),
                tokens=timed.tokens,
                seconds={phase: Spread.of(times) for phase, times in timed.seconds.items()},
                speedup=speedup,
                flops_speedup=round(allowed, 3),
                share_of_flops=round(reached / allowed, 3),
                share_of_ceiling=share_of_ceiling,
                memory=timed.memory,
                extrapolated=timed.extrapolated,
            )
        )
    return rows


def _flops(timed: Measurement, shape: Shape) -> int:
    return call_flops(shape, timed.tokens, shape.steps, METHODS[timed.setting.method].kv)


def _ratios(base: Measurement, other: Measurement, phase: str) -> Spread:
    """How many times the base's time the other's is in it, turn by turn."""
    pairs = zip(base.seconds[phase], other.seconds[phase], strict=True)
    return Spread.of([base_time / max(time, 1e-9) for base_time, time in pairs])


HEAD = (
    "size",
    "references",
    "method",
    "keep",
    "tokens",
    "end to end",
    "denoising",
    "FLOPs allow",
    "of it",
    "ceiling",
)


def table(figures: Figures) -> str:
    """The rows as text for a terminal."""
    lines = [HEAD, *map(_cells, figures.rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _cells(row: Row) -> tuple[str, ...]:
    times = (
        f"{row.seconds[phase].median:.2f} s {row.speedup[phase].median:.2f}x" if phase in row.speedup else ""
        for phase in ("total", "denoise")
    )
    return (
        str(row.size),
        str(row.references),
        row.method,
        "" if row.keep is None else f"{row.keep:g}",
        str(row.tokens.references),
        *times,
        f"{row.flops_speedup:.2f}x",
        f"{row.share_of_flops:.0%}",
        "" if row.share_of_ceiling is None else f"{row.share_of_ceiling:.0%}",
    )


def summary(figures: Figures) -> str:
    """The table, and below it how it was made: what the command prints."""
    turns = "1 turn" if figures.turns == 1 else f"{figures.turns} turns"
    took = "" if figures.took is None else f", in {figures.took:.0f} s"
    lines = [table(figures), f"{turns} after the warm-up{took}."]
    if figures.blocks is not None and figures.of is not None:
        double, single = figures.blocks
        lines.append(
            f"Measured with {double} double and {single} single blocks of {figures.of[0]} and {figures.of[1]}."
        )
    return "\n".join(lines)


def plot(figures: Figures, path: Path, quality: Sequence[Mapping[str, Any]] = ()) -> None:
    """Draw latency against references, a line for each method and keep; and what `quality` knows, against speed.

    `quality` has {"method", "keep", "references", "value", "metric"} for each point that is known. With one number of
    references there is no line to draw, and quality stands alone. Raises ValueError where matplotlib is missing.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    rows = figures.rows
    known = {(q["method"], q["keep"], q["references"]): q for q in quality}
    points = [(row, known[key]["value"]) for row in rows if (key := (row.method, row.keep, row.references)) in known]
    counts = sorted({row.references for row in rows})
    sizes = [] if points and len(counts) == 1 else sorted({row.size for row in rows})
    figure = Figure(figsize=(6.4 * (len(sizes) + bool(points)), 4.4), layout="constrained")
    axes = figure.subplots(1, len(sizes) + bool(points), squeeze=False)[0]
    phase = "total" if "total" in rows[0].seconds else "denoise"
    styles = _styles(rows)
    for axis, size in zip(axes, sizes, strict=False):
        _draw_latency(axis, [row for row in rows if row.size == size], phase, styles)
        axis.set(
            xlabel="references",
            ylabel=f"{'call' if phase == 'total' else 'denoising'}, seconds",
            title=f"{size} x {size} pixels",
            ylim=(0, None),
            xticks=counts,
        )
        axis.legend(fontsize="small")
    if points:
        _draw_quality(axes[-1], points, phase, styles, name_counts=len(counts) > 1)
        axes[-1].set(
            xlim=(0, 1.35 * axes[-1].dataLim.x1),  # room for the last one's name
            xlabel="times faster than dense",
            ylabel=next(iter(known.values()))["metric"],
            title="quality against speed",
        )
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    save_picture(Image.open(png).convert("RGB"), path)


def _styles(rows: Sequence[Row]) -> dict[tuple[str, float | None], tuple[str, str]]:
    """(colour, line style) of each method and keep, in the order of `METHODS`, most tokens first."""
    lines = {(row.method, row.keep) for row in rows}
    ordered = sorted(lines, key=lambda line: (list(METHODS).index(line[0]), -(line[1] or 0)))
    colours = {method: f"C{i}" for i, method in enumerate(dict.fromkeys(method for method, _ in ordered))}
    keeps = sorted({keep for _, keep in ordered if keep is not None}, reverse=True)
    dashes = {keep: ("-", "--", ":", "-.")[i % 4] for i, keep in enumerate(keeps)} | {None: "-"}
    return {(method, keep): (colours[method], dashes[keep]) for method, keep in ordered}


def _draw_latency(axis: Any, rows: Sequence[Row], phase: str, styles: Mapping[tuple, tuple[str, str]]) -> None:
    for (method, keep), (colour, dash) in styles.items():
        times = {row.references: row.seconds[phase] for row in rows if (row.method, row.keep) == (method, keep)}
        spreads = list(times.values())
        axis.errorbar(
            list(times),
            [spread.median for spread in spreads],
            [[spread.median - spread.min for spread in spreads], [spread.max - spread.median for spread in spreads]],
            label=_name(method, keep),
            marker="o",
            capsize=3,
            color=colour,
            linestyle=dash,
        )


def _draw_quality(
    axis: Any,
    points: Sequence[tuple[Row, float]],
    phase: str,
    styles: Mapping[tuple, tuple[str, str]],
    name_counts: bool,
) -> None:
    for i, (row, value) in enumerate(points):
        place = row.speedup[phase].median, value
        name = _name(row.method, row.keep) + (f", {row.references} references" if name_counts else "")
        axis.scatter(*place, color=styles[row.method, row.keep][0])
        axis.annotate(name, place, (5, (4, -11)[i % 2]), textcoords="offset points", fontsize="small")
    axis.margins(y=0.1)


def _name(method: str, keep: float | None) -> str:
    return method.replace("_", " ") if keep is None else f"{method.replace('_', ' ')}, keep {keep:g}"
