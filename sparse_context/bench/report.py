"""What a benchmark measured: compared, as a table, as a picture."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from PIL import Image

from ..evaluation.plots import check_matplotlib
from ..families.shape import Shape, Tokens
from ..images import save_picture
from .flops import call_flops
from .methods import METHODS

TIMED = ("Flux2KleinPipeline", "Flux2Pipeline")


REPORTED = ("text", "encode", "selection", "denoise", "decode", "total")


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


def compare(rows: list[dict[str, Any]], shape: Shape) -> list[dict[str, Any]]:
    """`rows`, whose `seconds` are lists with one entry a turn, with medians, ratios to dense and what FLOPs allow."""
    compared = []
    for row in rows:
        alike = [r for r in rows if (r["size"], r["references"]) == (row["size"], row["references"])]
        base = next(r for r in alike if r["method"] == "dense")
        ceiling = next((r for r in alike if r["method"] == "no_references"), None)
        faster = {
            p: _ratios(base["seconds"][p], row["seconds"][p]) for p in ("total", "denoise") if p in row["seconds"]
        }
        flops = [call_flops(shape, Tokens(**r["tokens"]), shape.steps, METHODS[r["method"]].kv) for r in (base, row)]
        predicted = flops[0] / flops[1]
        reached = faster["denoise"]["median"]
        compared.append(
            {
                **row,
                "seconds": {phase: _spread(times) for phase, times in row["seconds"].items()},
                "times faster": faster,
                "predicted": round(predicted, 3),
                "of predicted": round(reached / predicted, 3),
            }
        )
        if ceiling is not None:
            most = _ratios(base["seconds"]["denoise"], ceiling["seconds"]["denoise"])["median"]
            compared[-1]["of ceiling"] = round(reached / most, 3)
    return compared


def table(figures: dict[str, Any]) -> str:
    """The rows as text for a terminal."""
    head = (
        "size",
        "references",
        "method",
        "keep",
        "tokens",
        "end to end",
        "denoising",
        "predicted",
        "of it",
        "ceiling",
    )
    lines = [head]
    for row in figures["rows"]:
        faster, seconds = row["times faster"], row["seconds"]
        lines.append(
            (
                str(row["size"]),
                str(row["references"]),
                row["method"],
                "" if row["keep"] is None else f"{row['keep']:g}",
                str(row["tokens"]["references"]),
                *(
                    f"{seconds[p]['median']:.2f} s {faster[p]['median']:.2f}x" if p in faster else ""
                    for p in ("total", "denoise")
                ),
                f"{row['predicted']:.2f}x",
                f"{row['of predicted']:.0%}",
                f"{row['of ceiling']:.0%}" if "of ceiling" in row else "",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def plot(figures: dict[str, Any], path: Path, quality: Sequence[dict[str, Any]] = ()) -> None:
    """Draw latency against references, a line for each method and keep; and what `quality` knows, against speed.

    `quality` has {"method", "keep", "references", "value", "metric"} for each point that is known. With one number of
    references there is no line to draw, and quality stands alone. Raises ValueError where matplotlib is missing.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    rows = figures["rows"]
    phase = "total" if "total" in rows[0]["seconds"] else "denoise"
    sizes = sorted({row["size"] for row in rows})
    known = {(q["method"], q["keep"], q["references"]): q for q in quality}
    points = [
        (row, known[key]["value"]) for row in rows if (key := (row["method"], row["keep"], row["references"])) in known
    ]
    counts = sorted({row["references"] for row in rows})
    sizes = [] if points and len(counts) == 1 else sizes
    figure = Figure(figsize=(6.4 * (len(sizes) + bool(points)), 4.4), layout="constrained")
    axes = figure.subplots(1, len(sizes) + bool(points), squeeze=False)[0]
    lines = sorted(
        {(row["method"], row["keep"]) for row in rows}, key=lambda each: (list(METHODS).index(each[0]), -(each[1] or 0))
    )
    colours = {method: f"C{i}" for i, method in enumerate(dict.fromkeys(method for method, _ in lines))}
    keeps = sorted({keep for _, keep in lines if keep is not None}, reverse=True)
    styles = {keep: ("-", "--", ":", "-.")[i % 4] for i, keep in enumerate(keeps)} | {None: "-"}
    for axis, size in zip(axes, sizes, strict=False):
        for method, keep in lines:
            of = [r for r in rows if (r["method"], r["keep"], r["size"]) == (method, keep, size)]
            medians = [row["seconds"][phase]["median"] for row in of]
            spread = [
                [m - row["seconds"][phase]["min"] for m, row in zip(medians, of, strict=True)],
                [row["seconds"][phase]["max"] - m for m, row in zip(medians, of, strict=True)],
            ]
            name = _line(method, keep)
            axis.errorbar(
                [row["references"] for row in of],
                medians,
                spread,
                label=name,
                marker="o",
                capsize=3,
                color=colours[method],
                linestyle=styles[keep],
            )
        axis.set(
            xlabel="references",
            ylabel=f"{'call' if phase == 'total' else 'denoising'}, seconds",
            title=f"{size} x {size} pixels",
            ylim=(0, None),
            xticks=counts,
        )
        axis.legend(fontsize="small")
    if points:
        compared = all("times faster" in row for row, _ in points)  # with dense, if that was measured
        for i, (row, value) in enumerate(points):
            at = row["times faster" if compared else "seconds"][phase]["median"], value
            name = _line(row["method"], row["keep"])
            name += "" if len(counts) == 1 else f", {row['references']} references"
            axes[-1].scatter(*at, color=colours[row["method"]])
            axes[-1].annotate(name, at, (5, (4, -11)[i % 2]), textcoords="offset points", fontsize="small")
        axes[-1].margins(y=0.1)
        axes[-1].set(
            xlim=(0, 1.35 * axes[-1].dataLim.x1),  # room for the last one's name
            xlabel="times faster than dense" if compared else "seconds",
            ylabel=next(iter(known.values()))["metric"],
            title="quality against speed",
        )
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=120)
    save_picture(Image.open(drawn).convert("RGB"), path)


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": round(median(values), 5), "min": round(min(values), 5), "max": round(max(values), 5)}


def _ratios(base: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    return _spread([b / max(o, 1e-9) for b, o in zip(base, other, strict=True)])


def _line(method: str, keep: float | None) -> str:
    return method.replace("_", " ") if keep is None else f"{method.replace('_', ' ')}, keep {keep:g}"
