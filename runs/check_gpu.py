"""Whether the figures of a CUDA GPU that runs/bench_gpu.sh has written are the ones to reach; exit 1 if not.

python runs/check_gpu.py [results/bench_gpu_klein-9b.json ...]
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def check(figures: dict) -> dict[str, tuple[float, float, bool, bool]]:
    """What is to be reached at 1024 x 1024 and keep 0.1 -> its value, the bound, whether that is the least that is
    wanted (or else the most), and whether it is reached."""
    rows = {
        (r["references"], r["method"]): r for r in figures["rows"] if r["size"] == 1024 and r["keep"] in (None, 0.1)
    }

    def denoise(references: int, method: str) -> float:
        return rows[references, method]["seconds"]["denoise"]["median"]

    four = {method: denoise(4, method) for method in ("dense", "kv", "sparse", "sparse_kv")}
    seconds = rows[4, "sparse"]["seconds"]
    memory = rows[4, "sparse"]["memory"]["denoise"] / rows[4, "dense"]["memory"]["denoise"]
    selection = seconds["selection"]["median"] / seconds["total"]["median"]
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


def main() -> None:
    paths = [Path(path) for path in sys.argv[1:]] or sorted((ROOT / "results").glob("bench_gpu_*.json"))
    if not paths:
        sys.exit("There are no results of a GPU yet: run runs/bench_gpu.sh where one is.")
    missed = False
    for path in paths:
        for name, (value, _, _, reached) in check(json.loads(path.read_text(encoding="utf-8"))["figures"]).items():
            missed |= not reached
            print(f"{path.stem}: {'yes' if reached else 'NO ':3} {name}: {value:.2f}")
    sys.exit(missed)


if __name__ == "__main__":
    main()
