"""One double and one single block of klein on a CPU, in bfloat16: denoising with four references, and with one.

    python runs/bench_klein_blocks.py [--shape klein-9b] [--size 1024] [--minutes 8]

At the true size a dense forward of klein-9B with four references is 33 TFLOP for the two blocks. So one turn may be all
there is time for; the warm-up is the shortest forward. The figures to reach at keep 0.1: at least 94 % of what the
FLOPs allow. Whether they were is printed and part of the record.
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
NAMES = ("klein-9b", "klein-4b")


def blocks(shape: str) -> str:
    return bench_table(read_bench(f"bench_blocks_{shape}").rows)


TABLES = {f"bench_blocks_{shape}": partial(blocks, shape) for shape in NAMES}


def main() -> None:
    parser = argparse.ArgumentParser(description="Blocks of klein on a CPU.")
    parser.add_argument("--shape", choices=NAMES, default="klein-9b")
    parser.add_argument("--size", type=int, default=1024, help="pixels a side of the output and the references")
    parser.add_argument("--minutes", type=float, default=8.0)
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
        turns=5,
        minutes=arguments.minutes,
        steps=1,
    )
    figures = bench_blocks(SHAPES[arguments.shape], 1, torch.device("cpu"), torch.bfloat16, config)
    for row in figures.rows:
        if row.method == "sparse":
            figures.reached[f"{row.references} references, 94 % of the FLOPs' ratio"] = row.share_of_flops >= 0.94
    print(table(figures))
    for name, reached in figures.reached.items():
        print(f"{'yes' if reached else 'NO ':3} {name}")
    settings = {
        "shape": arguments.shape,
        "keep": 0.1,
        "size": arguments.size,
        "dtype": "bfloat16",
        "threads": torch.get_num_threads(),
        "warm_up": "the shortest forward",
    }
    name = f"bench_blocks_{arguments.shape}"
    write_result(ROOT / "results" / f"{name}.json", name, settings, asdict(figures))
    draw(TABLES)


if __name__ == "__main__":
    main()
