"""Whether the figures of a CUDA GPU that runs/bench_gpu.sh has written are the ones to reach; exit 1 if not.

python runs/check_gpu.py [results/bench_gpu_klein-9b.json ...]
python runs/check_gpu.py --table    # draw their tables
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

from tables import bench_table, draw, read_bench, table

from sparse_context.bench.figures import Figures

ROOT = Path(__file__).resolve().parents[1]


def check(figures: Figures) -> dict[str, tuple[float, float, bool, bool]]:
    """What is to be reached at 1024 x 1024 and keep 0.1 -> its value, the bound, whether that is the least that is
    wanted (or else the most), and whether it is reached."""
    rows = {(row.references, row.method): row for row in figures.rows if row.size == 1024 and row.keep in (None, 0.1)}

    def denoise(references: int, method: str) -> float:
        return rows[references, method].seconds["denoise"].median

    four = {method: denoise(4, method) for method in ("dense", "kv", "sparse", "sparse_kv")}
    seconds = rows[4, "sparse"].seconds
    memory = rows[4, "sparse"].memory["denoise"] / rows[4, "dense"].memory["denoise"]
    selection = seconds["selection"].median / seconds["total"].median
    least = {
        "4 references, sparse + KV to dense": (four["dense"] / four["sparse_kv"], 5.0),
        "4 references, sparse + KV to KV": (four["kv"] / four["sparse_kv"], 2.0),
        "4 references, sparse to dense": (four["dense"] / four["sparse"], 4.0),
        "1 reference, sparse to dense": (denoise(1, "dense") / denoise(1, "sparse"), 1.75),
    }
    most = {
        "4 references, memory of denoising, sparse to dense": (memory, 0.35),
        "4 references, selection's share of the sparse call": (selection, 0.05),
    }
    reached = {name: (value, bound, True, value >= bound) for name, (value, bound) in least.items()}
    return reached | {name: (value, bound, False, value <= bound) for name, (value, bound) in most.items()}


SHORT = (
    ("dense", None),
    ("kv", None),
    ("downscaled", 0.1),
    ("merged", 0.1),
    ("sparse", 0.2),
    ("sparse", 0.1),
    ("sparse_cached", 0.1),
    ("sparse_kv", 0.1),
    ("no_references", None),
)
"""Methods and keeps of the short table."""


def whole_calls() -> str:
    """Whole calls of the klein shapes with four references: what a user waits for, and what memory denoising takes."""
    rows = []
    for shape in ("klein-9b", "klein-4b"):
        for row in read_bench(f"bench_gpu_{shape}").rows:
            if row.size == 1024 and row.references == 4 and (row.method, row.keep) in SHORT:
                rows.append(
                    [
                        shape,
                        row.method.replace("_", " "),
                        "" if row.keep is None else f"{row.keep:g}",
                        *(
                            f"{row.seconds[phase].median:.2f} s, {row.speedup[phase].median:.1f}x"
                            for phase in ("total", "denoise")
                        ),
                        f"{row.memory['denoise'] / 2**30:.1f} GiB",
                    ]
                )
    return table(["shape", "method", "keep", "end to end", "denoising", "memory of denoising"], rows)


def every_row(shape: str) -> str:
    """All that was measured at 1024 x 1024 pixels."""
    return bench_table(row for row in read_bench(f"bench_gpu_{shape}").rows if row.size == 1024)


def choosing() -> str:
    """What choosing tokens takes of a call with four references."""
    rows = []
    for row in read_bench("choosing_gpu").rows:
        seconds = {phase: times.median for phase, times in row.seconds.items()}
        if seconds["selection"]:
            times = (f"{1000 * seconds[phase]:.0f} ms" for phase in ("encode", "selection", "denoise", "total"))
            share = f"{seconds['selection'] / seconds['total']:.1%}"
            rows.append([row.method.replace("_", " "), *times, share])
    return table(["method", "encoding", "choosing", "denoising", "whole call", "choosing's share"], rows)


TABLES = {
    "bench_gpu": whole_calls,
    "bench_gpu_klein-9b": partial(every_row, "klein-9b"),
    "bench_gpu_klein-4b": partial(every_row, "klein-4b"),
    "choosing_gpu": choosing,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Whether the figures of a GPU are the ones to reach.")
    parser.add_argument("results", type=Path, nargs="*", help="those of results/bench_gpu_*.json without it")
    parser.add_argument("--table", action="store_true", help="only draw the tables of results/ again, from the JSON")
    arguments = parser.parse_args()
    if arguments.table:
        return draw(TABLES)
    paths = arguments.results or sorted((ROOT / "results").glob("bench_gpu_*.json"))
    if not paths:
        sys.exit("There are no results of a GPU yet: run runs/bench_gpu.sh where one is.")
    missed = False
    for path in paths:
        figures = Figures(**json.loads(path.read_text(encoding="utf-8"))["figures"])
        for name, (value, _, _, reached) in check(figures).items():
            missed |= not reached
            print(f"{path.stem}: {'yes' if reached else 'NO ':3} {name}: {value:.2f}")
    sys.exit(missed)


if __name__ == "__main__":
    main()
