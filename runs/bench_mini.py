"""Every method on the embedded model, end to end, with one, two and four references, at its shipped steps.

    python runs/bench_mini.py [--minutes 7] [--output results/bench_mini.json]

The figures to reach with four references, on two cores, all of the call: sparse at least 3 times as fast as dense with
references encoded in the call, 3.5 times with references that were used before, and 90 % of what its tokens allow. New
references: within 3 % of merged ones and 10 % of downscaled ones, which need not choose. References that were used
before, or KV: sooner done than KV alone, downscaled and merged ones (`check`).
What runs/peers.py and runs/kv.py found of the quality at the same keep is drawn against the times.
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tables import bench_table, draw, read_bench

from sparse_context.bench.calls import bench
from sparse_context.bench.config import BenchConfig
from sparse_context.bench.figures import Figures
from sparse_context.bench.report import plot, table
from sparse_context.embedded.demo import read_examples
from sparse_context.pipelines.load import load
from sparse_context.pipelines.spec import ModelSpec
from sparse_context.result import checkout, write_result

ROOT = Path(__file__).resolve().parents[1]
KEEP = 0.15
REFERENCES = (1, 2, 4)
QUALITY = {
    "dense": ("peers", "dense"),
    "downscaled": ("peers", f"downscaled {KEEP:g}"),
    "merged": ("peers", f"merged {KEEP:g}"),
    "sparse": ("peers", f"sparse, fine-tuned {KEEP:g}"),
    "sparse_cached": ("peers", f"sparse, fine-tuned {KEEP:g}"),
    "kv": ("kv", "KV, fine-tuned, all tokens"),
    "sparse_kv": ("kv", f"KV, fine-tuned, keep {KEEP:g}"),
}
"""Of each method the result that holds its quality, and what it is called there."""


def known_quality(group: str = "subjects", score: str = "psnr_in_mask") -> dict[str, dict]:
    """What is known of the methods' quality at `KEEP`, by method: the entry of `evaluation.evaluate.summarise`."""
    found = {}
    for method, (result, setting) in QUALITY.items():
        file = ROOT / "results" / f"{result}.json"
        figures = json.loads(file.read_text(encoding="utf-8"))["figures"] if file.is_file() else {}
        if setting in figures.get(group, {}):
            found[method] = figures[group][setting]["scores"][score]
    return found


def check(figures: Figures) -> dict[str, tuple[float, float, bool, bool]]:
    """What is to be reached end to end, as `check_gpu.check` gives it: times faster than dense, and than the others."""
    rows = {row.method: row for row in figures.rows if row.references == REFERENCES[-1]}
    faster = {method: row.speedup["total"].median for method, row in rows.items()}
    asked = {
        "sparse": (faster["sparse"], 3.0),
        "sparse, of what its tokens allow": (faster["sparse"] / rows["sparse"].flops_speedup, 0.9),
        "sparse, references cached": (faster["sparse_cached"], 3.5),
        "sparse to kv": (faster["sparse"] / faster["kv"], 1.0),
        "sparse to merged": (faster["sparse"] / faster["merged"], 0.97),
        "sparse to downscaled": (faster["sparse"] / faster["downscaled"], 0.9),
    } | {
        f"{ours.replace('_', ' ')} to {other}": (faster[ours] / faster[other], 1.0)
        for ours in ("sparse_cached", "sparse_kv")
        for other in ("kv", "downscaled", "merged")
    }
    return {name: (value, bound, True, value > bound) for name, (value, bound) in asked.items()}


def bench_mini() -> str:
    """The benchmark, with what each method costs in quality at that keep."""
    costs = {
        f"{group}, dB": {method: f"{entry['difference']:+.1f}" for method, entry in known_quality(group).items()}
        for group in ("subjects", "edits")
    }
    return bench_table(read_bench("bench_mini").rows, costs)


TABLES = {
    "bench_mini": bench_mini,
}


def save_plot(figures: Figures, path: Path) -> None:
    """Draw what is known of quality against speed, with the most references. (Seconds of a CPU say little.)"""
    figures = replace(figures, rows=[row for row in figures.rows if row.references == REFERENCES[-1]])
    keeps = {row.method: row.keep for row in figures.rows}
    quality = [
        {
            "method": name,
            "keep": keeps[name],
            "references": REFERENCES[-1],
            "value": entry["mean"],
            "metric": "PSNR inside the objects, dB",
        }
        for name, entry in known_quality().items()
    ]
    plot(figures, path, quality)


def main() -> None:
    parser = argparse.ArgumentParser(description="Every method on the embedded model, end to end.")
    parser.add_argument("--minutes", type=float, default=7.0)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "bench_mini.json")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "images" / "speed-cpu.webp")
    parser.add_argument("--table", action="store_true", help="only draw the tables of results/ again, from the JSON")
    arguments = parser.parse_args()
    checkout()  # of the code that runs, whatever is committed meanwhile
    if arguments.table:
        save_plot(read_bench("bench_mini"), arguments.plot)
        return draw(TABLES)

    scene = next(e for e in read_examples() if len(e["references"]) == 4)
    pipe = load(ModelSpec(device="cpu"))
    config = BenchConfig(references=REFERENCES, keep=(KEEP,), turns=9, minutes=arguments.minutes)
    figures = bench(pipe, scene["references"], scene["prompt"], config)
    print(table(figures))
    for name, (value, bound, _, reached) in check(figures).items():
        print(f"{'yes' if reached else 'NO ':3} {name}: {value:.2f}, asked {bound:g}")
    settings = {
        "keep": KEEP,
        "references": REFERENCES,
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "scene": scene["name"],
    }
    write_result(arguments.output, "bench_mini", settings, asdict(figures))
    draw(TABLES)
    save_plot(figures, arguments.plot)


if __name__ == "__main__":
    main()
