"""The benchmarks by their names, and the tables that a paper prints of them. To add one, write its reader and give it
a line in `BENCHMARKS`."""

from collections.abc import Mapping, Sequence
from typing import Any

from .benchmark import Benchmark
from .custom_concept import CUSTOM_CONCEPT
from .dreambench import DREAMBENCH
from .grid import DENSE
from .omnicontext import OMNICONTEXT
from .pie_bench import PIE_BENCH

BENCHMARKS: dict[str, Benchmark] = {
    "pie-bench": PIE_BENCH,
    "dreambench++": DREAMBENCH,
    "customconcept101": CUSTOM_CONCEPT,
    "omnicontext": OMNICONTEXT,
}


def find_benchmark(name: str) -> Benchmark:
    """A benchmark by its name, in any capitals. Raises ValueError for a name that there is not."""
    if name.lower() not in BENCHMARKS:
        raise ValueError(f"benchmark is {name!r}: choose one of {', '.join(BENCHMARKS)}.")
    return BENCHMARKS[name.lower()]


def paper_tables(result: Mapping[str, Any], benchmark: Benchmark) -> str:
    """Markdown: a table of all scores over all samples, and one for each score with a column a group.

    A line is a setting: the share of tokens kept, means, and behind them the mean difference to all tokens.
    """
    figures = result["figures"]
    everything = figures["all"]
    scores = list(dict.fromkeys(score for cell in everything.values() for score in cell["scores"]))
    parts = [_table("setting", everything, [(score, "all") for score in scores], scores, figures)]
    for score in scores:
        groups = benchmark.groups.get(score, [group for group in figures if group != "all"])
        shown = [group for group in groups if group in figures]
        if [group for group in shown if group != "all"]:
            parts.append(f"## {score}\n\n" + _table("setting", everything, [(score, g) for g in shown], shown, figures))
    return "\n\n".join(parts) + "\n"


def _table(
    first: str,
    cells: Mapping[str, Any],
    columns: Sequence[tuple[str, str]],
    heads: Sequence[str],
    figures: Mapping[str, Any],
) -> str:
    lines = [[first, "kept", *heads], ["---"] * (len(heads) + 2)]
    for name, cell in cells.items():
        kept = "" if cell["kept"] is None else f"{100 * cell['kept']:.1f} %"
        entries = [figures[group].get(name, {"scores": {}})["scores"].get(score) for score, group in columns]
        lines.append([name, kept, *(_show(entry, name == DENSE) for entry in entries)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _show(entry: Mapping[str, Any] | None, dense: bool) -> str:
    if entry is None:
        return "-"
    difference = "" if dense or "difference" not in entry else f" ({entry['difference']:+.3f})"
    return f"{entry['mean']:.3f}{difference}"
