"""What the FLOPs of klein-9B allow: 1024 x 1024 pixels of output and of each reference, four steps.

Nothing is measured: this is the benchmark's FLOP model, which a test holds to torch's own counter.

    python runs/flops.py
"""

import argparse

from tables import draw, table

from sparse_context.bench.flops import call_flops
from sparse_context.bench.shapes import SHAPES
from sparse_context.families.shape import Tokens

WAYS = {
    "no references": (0, False),
    "keep 0.5": (0.5, False),
    "keep 0.2": (0.2, False),
    "keep 0.1": (0.1, False),
    "KV": (1.0, True),
    "keep 0.2 + KV": (0.2, True),
    "keep 0.1 + KV": (0.1, True),
}


def flops() -> str:
    """How many times fewer operations than the dense call, by the number of references."""
    shape, grid = SHAPES["klein-9b"], 64 * 64
    rows = []
    for count in (1, 2, 4, 8, 10):
        dense = call_flops(shape, Tokens(shape.text, grid, grid * count), 4)
        ratios = (
            dense / call_flops(shape, Tokens(shape.text, grid, round(keep * grid * count)), 4, kv)
            for keep, kv in WAYS.values()
        )
        rows.append([str(count), *(f"{ratio:.2f}x" for ratio in ratios)])
    return table(["references", *WAYS], rows)


TABLES = {"flops": flops}


def main() -> None:
    argparse.ArgumentParser(description="Draw the table of what the FLOPs allow.").parse_args()
    draw(TABLES)


if __name__ == "__main__":
    main()
