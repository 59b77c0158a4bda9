"""One double and one single block of klein on a CPU, in bfloat16: denoising with four references, and with one.

    python runs/bench_klein_blocks.py [--shape klein-9b] [--size 1024] [--minutes 8]

At the true size a dense forward with four references is 33 TFLOP for the two blocks of klein-9B. So one turn may be all
there is time for; the warm-up is the shortest forward. The figures to reach at keep 0.1: 4.4 times as fast with four
references and 1.8 times with one in the shape of klein-9B, and at least 94 % of what the FLOPs allow. Whether they were
is printed and part of the record.
"""

import argparse
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from tables import bench_table, draw, read_bench

from sparse_context.bench.blocks import bench_blocks
from sparse_context.bench.config import BenchConfig
from sparse_context.bench.report import table
from sparse_context.bench.shapes import SHAPES
from sparse_context.result import checkout, write_result

ROOT = Path(__file__).resolve().parents[1]
LEAST = {"klein-9b": {1: 1.8, 4: 4.4}}
NAMES = {shape: f"bench_{shape.replace('-', '_')}_blocks" for shape in ("klein-9b", "klein-4b")}


def blocks(name: str) -> str:
    return bench_table(read_bench(name).rows)


TABLES = {name: partial(blocks, name) for name in NAMES.values()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Blocks of klein on a CPU.")
    parser.add_argument("--shape", choices=NAMES, default="klein-9b")
    parser.add_argument("--size", type=int, default=1024, help="pixels a side of the output and the references")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--output", type=Path, help="results/bench_SHAPE_blocks.json without it")
    parser.add_argument("--table", action="store_true", help="only draw the tables of results/ again, from the JSON")
    arguments = parser.parse_args()
    checkout()  # of the code that runs, whatever is committed meanwhile
    if arguments.table:
        return draw(TABLES)

    config = BenchConfig(
        references=(4, 1),
        keep=(0.1,),
        size=(arguments.size,),
        methods=("dense", "sparse", "no_references"),
        turns=3,
        minutes=arguments.minutes,
        steps=1,
    )
    name, shape = NAMES[arguments.shape], arguments.shape
    figures = bench_blocks(SHAPES[shape], 1, torch.device("cpu"), torch.bfloat16, config)
    for row in figures.rows:
        if row.method == "sparse":
            count, speedup = row.references, row.speedup["denoise"].median
            if least := LEAST.get(shape, {}).get(count):
                figures.reached[f"{count} references, {least}x"] = speedup >= least
            figures.reached[f"{count} references, 94 % of the FLOPs' ratio"] = row.share_of_flops >= 0.94
    print(table(figures))
    for goal, reached in figures.reached.items():
        print(f"{'yes' if reached else 'NO ':3} {goal}")
    settings = {
        "shape": shape,
        "keep": 0.1,
        "size": arguments.size,
        "dtype": "bfloat16",
        "threads": torch.get_num_threads(),
        "warm_up": "the shortest forward",
    }
    write_result(arguments.output or ROOT / "results" / f"{name}.json", name, settings, asdict(figures))
    draw(TABLES)


if __name__ == "__main__":
    main()
