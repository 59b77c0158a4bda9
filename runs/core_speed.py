"""Dense against sparse on the embedded model, end to end, for one to four references.

Both run in one process in turns (dense, sparse, dense, sparse ...), with the same references, prompt, seed and steps;
each figure is the median over the turns, and the ratio is the median of the ratios of neighbouring turns. The scene is
the one of the demo that has four references; fewer are its first ones.

    python runs/core_speed.py [--keep 0.15] [--output results/core_speed.json]
"""

import argparse
from dataclasses import asdict
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

from sparse_context import SparseContextConfig
from sparse_context.generation import call_settings, generate, load_pipeline
from sparse_context.mini.demo import read_examples
from sparse_context.result import write_result

ROOT = Path(__file__).resolve().parents[1]
TURNS = 7


def main() -> None:
    parser = argparse.ArgumentParser(description="Dense against sparse on the embedded model.")
    parser.add_argument("--keep", type=float, default=0.15)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "core_speed.json")
    arguments = parser.parse_args()

    scene = next(e for e in read_examples() if len(e["references"]) == 4)
    pipe = load_pipeline(device="cpu")
    pipe.set_progress_bar_config(disable=True)
    configs = {"dense": SparseContextConfig(keep=1.0), "sparse": SparseContextConfig(keep=arguments.keep)}
    rows = {}
    for count in tqdm((1, 2, 4), desc="references"):
        references = scene["references"][:count]
        turns: dict[str, list[dict]] = {name: [] for name in configs}
        for turn in range(TURNS + 1):
            for name, config in configs.items():
                made = generate(pipe, references, scene["prompt"], config)
                if turn:  # the first is the warm-up
                    turns[name].append(asdict(made.times))
                tokens = {"kept": made.selection.kept, "of": made.selection.total}
        phases = {n: {p: round(median(t[p] for t in ts), 4) for p in ts[0]} for n, ts in turns.items()}
        pairs = list(zip(turns["dense"], turns["sparse"], strict=True))
        ratios = {p: sorted(d[p] / s[p] for d, s in pairs) for p in ("total", "denoise")}
        rows[count] = {
            "tokens": tokens,
            "seconds": phases,
            "times faster": {p: {"median": round(median(r), 3), "min": round(r[0], 3), "max": round(r[-1], 3)}
                             for p, r in ratios.items()},
        }  # fmt: skip
    print(f"{'references':>10}{'tokens kept':>16}{'end to end':>12}{'denoise only':>14}")
    for count, row in rows.items():
        faster = row["times faster"]
        print(f"{count:>10}{row['tokens']['kept']:>9} of {row['tokens']['of']:<5}"
              f"{faster['total']['median']:>10.2f}x{faster['denoise']['median']:>12.2f}x")  # fmt: skip
    config = {"keep": arguments.keep, "turns": TURNS, "dtype": "float32", "threads": torch.get_num_threads(),
              **{k: v for k, v in call_settings(pipe).items() if k != "training_steps"}}  # fmt: skip
    write_result(arguments.output, "core_speed", config, rows)


if __name__ == "__main__":
    main()
