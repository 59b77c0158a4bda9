"""The embedded model untouched, patched with all tokens kept, and sparse, end to end, for one to four references.

All run in one process in turns, with the same references, prompt, seed and steps; each figure is the median over the
turns, and a ratio is the median of the ratios within a turn. That of keep 1 to the untouched pipeline is what our patch
costs by itself; the two change places from turn to turn, for neither is to come after sparse each time, which leaves
memory and caches as the other finds them. The scene is the one of the demo that has four references; fewer are its
first ones.

    python runs/core_speed.py [--keep 0.15] [--output results/core_speed.json]
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median

import torch
from tables import draw, read, speedup, table
from tqdm import tqdm

from sparse_context import SparseContextConfig, apply_sparse_context, last_selection, remove_sparse_context
from sparse_context.bench.figures import Spread
from sparse_context.embedded.demo import read_examples
from sparse_context.pipelines.load import load
from sparse_context.pipelines.settings import call_inputs, call_settings, reference_sides
from sparse_context.pipelines.spec import ModelSpec
from sparse_context.pipelines.timing import timed
from sparse_context.preview import fit_reference
from sparse_context.result import checkout, write_result

ROOT = Path(__file__).resolve().parents[1]
TURNS = 7


def core_speed() -> str:
    """Sparse, and patched with all tokens kept, against the untouched pipeline."""
    rows = []
    for count, row in read("core_speed")["figures"].items():
        total, denoise, overhead = (
            Spread(**each) for each in (row["speedup"]["total"], row["speedup"]["denoise"], row["patch_overhead"])
        )
        rows.append(
            [
                count,
                f"{row['tokens']['kept']} of {row['tokens']['of']}",
                speedup(total),
                f"{denoise.median:.2f}x",
                f"{overhead.median:.2f} ({overhead.min:.2f} to {overhead.max:.2f})",
            ]
        )
    head = ["references", "tokens kept", "end to end", "denoising", "all tokens kept / untouched, time"]
    return table(head, rows)


TABLES = {
    "core_speed": core_speed,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Dense against sparse on the embedded model.")
    parser.add_argument("--keep", type=float, default=0.15)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "core_speed.json")
    parser.add_argument("--table", action="store_true", help="only draw the tables of results/ again, from the JSON")
    arguments = parser.parse_args()
    checkout()  # of the code that runs, whatever is committed meanwhile
    if arguments.table:
        return draw(TABLES)

    scene = next(e for e in read_examples() if len(e["references"]) == 4)
    pipe = load(ModelSpec(device="cpu"))
    pipe.set_progress_bar_config(disable=True)
    settings = call_settings(pipe)
    given = {dial: value for dial, value in settings.items() if dial in call_inputs(pipe)}
    prepare: dict[str, Callable[[], object]] = {
        "untouched": lambda: remove_sparse_context(pipe),
        "keep 1": lambda: apply_sparse_context(pipe, keep=1.0),
        "sparse": lambda: apply_sparse_context(pipe, keep=arguments.keep),
    }

    def ratios(turns: dict[str, list[dict]], phase: str, one: str, other: str) -> dict[str, float]:
        found = sorted(a[phase] / b[phase] for a, b in zip(turns[one], turns[other], strict=True))
        return {"median": round(median(found), 3), "min": round(found[0], 3), "max": round(found[-1], 3)}

    rows = {}
    for count in tqdm((1, 2, 4), desc="references"):
        sides = reference_sides(settings["reference_size"], SparseContextConfig(), count)
        references = [fit_reference(*pair) for pair in zip(scene["references"][:count], sides, strict=True)]
        turns: dict[str, list[dict]] = {name: [] for name in prepare}
        for turn in range(TURNS + 1):
            for name in ("untouched", "keep 1", "sparse") if turn % 2 else ("keep 1", "untouched", "sparse"):
                prepare[name]()
                with timed(pipe) as times:
                    pipe(
                        image=references,
                        prompt=scene["prompt"],
                        guidance_scale=1.0,
                        generator=torch.Generator().manual_seed(0),
                        **given,
                    )
                if turn:  # the first is the warm-up
                    turns[name].append(asdict(times))
        selection = last_selection(pipe)
        rows[count] = {
            "tokens": {"kept": selection.kept, "of": selection.total},
            "seconds": {n: {p: round(median(t[p] for t in ts), 4) for p in ts[0]} for n, ts in turns.items()},
            "speedup": {phase: ratios(turns, phase, "untouched", "sparse") for phase in ("total", "denoise")},
            "patch_overhead": ratios(turns, "total", "keep 1", "untouched"),
        }
    print(f"{'references':>10}{'tokens kept':>16}{'end to end':>12}{'denoise only':>14}{'patch_overhead':>21}")
    for count, row in rows.items():
        faster = row["speedup"]
        print(
            f"{count:>10}{row['tokens']['kept']:>9} of {row['tokens']['of']:<5}"
            f"{faster['total']['median']:>10.2f}x{faster['denoise']['median']:>12.2f}x"
            f"{row['patch_overhead']['median']:>20.3f}x"
        )
    config = {
        "keep": arguments.keep,
        "turns": TURNS,
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        **{k: v for k, v in settings.items() if k != "training_steps"},
    }
    write_result(arguments.output, "core_speed", config, rows)
    draw(TABLES)


if __name__ == "__main__":
    main()
