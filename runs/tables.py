"""Markdown tables of the published figures: a run writes its tables beside its JSON, and pages include them.

    python runs/kv.py --table    # draws the tables of one run again from results/*.json, and measures nothing
    python runs/tables.py        # the same for every run

A run names its tables in `TABLES`: a file of results/, without its suffix -> the function that makes its text. A table
holds figures and nothing else: what they mean is said by the page that includes it (docs/include.py).
"""

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path

from sparse_context.bench.figures import Figures, Row, Spread

RESULTS = Path(__file__).resolve().parents[1] / "results"
SCORES = {"subjects": "psnr_in_mask", "edits": "psnr_in_mask", "global edits": "psnr"}
"""The groups of held-out scenes, and the score that counts in each."""
RUNS = (
    "ablations",
    "app_latency",
    "auto_budget",
    "base_quality",
    "batch_speed",
    "bench_klein_blocks",
    "bench_mini",
    "check_gpu",
    "comfyui_speed",
    "comfyui_tests",
    "core_speed",
    "coverage",
    "fits",
    "flops",
    "gaze",
    "global_keep",
    "headline",
    "kv",
    "mini_curves",
    "overview",
    "overview_gates",
    "overview_held",
    "overview_lora",
    "overview_speed",
    "peers",
    "phrase_models",
    "ray_kills",
    "saliency",
    "server_load",
    "server_soak",
    "server_speed",
    "tiled_encoding",
    "time_klein_training",
    "time_parts",
    "time_selection",
    "time_training",
    "training_curves",
    "whole_call",
)
"""The scripts that have tables."""


def read(name: str) -> dict:
    """A result, by the name of its file in results/."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def read_bench(name: str) -> Figures:
    """The figures of a benchmark, by the name of its file in results/."""
    return Figures(**read(name)["figures"])


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def machine(result: Mapping) -> str:
    """The machine that a result was measured on, as a sentence below its table."""
    hardware = result["hardware"]
    return f"Measured on {hardware['cores']} cores of {hardware['cpu']}."


def score_of(settings: Mapping[str, dict], name: str, of: str) -> dict:
    """The entry of a score in a setting of `evaluation.evaluate.summarise`; empty where no sample has it."""
    return settings.get(name, {}).get("scores", {}).get(of, {})


def difference(entry: Mapping, interval: bool = True) -> str:
    """What a setting gains or loses, "+0.4 (-0.2 to +0.9)"; empty where nothing is known of it."""
    if "difference" not in entry:
        return ""
    low, high = entry["difference_interval"] or (None, None)
    return f"{entry['difference']:+.1f}" + (f" ({low:+.1f} to {high:+.1f})" if interval and low is not None else "")


def speedup(ratio: Spread) -> str:
    """A ratio of times, and the range over the turns where there were several: "2.11x (2.06 to 2.25)"."""
    spread = "" if ratio.min == ratio.max else f" ({ratio.min:.2f} to {ratio.max:.2f})"
    return f"{ratio.median:.2f}x{spread}"


def bench_table(rows: Iterable[Row], more: Mapping[str, Mapping[str, str]] | None = None) -> str:
    """The rows of a benchmark. more: further columns, each with its texts by method."""
    more = more or {}
    head = [
        "references",
        "method",
        "keep",
        "tokens",
        "end to end",
        "denoising",
        "FLOPs allow",
        "share of that",
        "share of the ceiling",
        *more,
    ]
    cells = [
        [
            str(row.references),
            row.method.replace("_", " "),
            "" if row.keep is None else f"{row.keep:g}",
            str(row.tokens.references),
            *(speedup(row.speedup[phase]) if phase in row.speedup else "" for phase in ("total", "denoise")),
            f"{row.flops_speedup:.2f}x",
            f"{row.share_of_flops:.0%}",
            f"{row.share_of_ceiling:.0%}",
            *(texts.get(row.method, "") for texts in more.values()),
        ]
        for row in rows
    ]
    return table(head, cells)


def draw(tables: Mapping[str, Callable[[], str]], folder: Path = RESULTS) -> None:
    """Write each table to its file; one whose results are not there is left as it is."""
    for name, make in tables.items():
        try:
            text = make()
        except FileNotFoundError as error:
            print(f"{name}.md was not drawn: {error.filename} is missing")
            continue
        (folder / f"{name}.md").write_text(text + "\n", encoding="utf-8")


def all_tables() -> dict[str, Callable[[], str]]:
    """The tables of every run."""
    return {name: make for run in RUNS for name, make in import_module(run).TABLES.items()}


def main() -> None:
    argparse.ArgumentParser(description="Draw every table of results/ again from its JSON.").parse_args()
    draw(all_tables())


if __name__ == "__main__":
    main()
