"""How long choosing tokens takes, for one reference of one megapixel on one core.

Each selector is timed end to end through `select_tokens`: from uint8 pixels to sorted indices, at the default keep of
0.2. The picture is made here, to be like a photograph in what matters to the selectors: shading, texture at every
scale, outlines and grain. What is published is the median of the runs after a warm-up, with the spread.

    python runs/time_selection.py [--output results/selection.json]
"""

import os

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")  # read when numpy loads

import argparse
from pathlib import Path

import cv2
import numpy as np
from tables import draw, read, table

from sparse_context.config import SparseContextConfig
from sparse_context.result import checkout, write_result
from sparse_context.selection import select_tokens
from sparse_context.selectors.registry import SELECTORS

ROOT = Path(__file__).resolve().parents[1]
SIDE, GRID, WARM_UP, RUNS = 1024, (64, 64), 5, 30


def picture(side: int = SIDE) -> np.ndarray:
    """A synthetic photograph, uint8 RGBA (side, side, 4): shaded sky, textured ground, shapes, grain; alpha a disc."""
    rng = np.random.default_rng(0)
    height = np.linspace(0, 1, side)[:, None, None]
    image = np.array([200, 180, 160]) + np.array([-80, -60, 60]) * height + np.zeros((side, side, 1))
    for cells, strength in ((8, 40), (32, 25), (128, 15), (512, 10)):
        texture = cv2.resize(rng.normal(0, strength, (cells, cells, 3)), (side, side), interpolation=cv2.INTER_CUBIC)
        image += texture * (height > 0.4)
    for _ in range(25):
        centre = rng.integers(0, side, 2).tolist()
        axes = rng.integers(side // 50, side // 6, 2).tolist()
        cv2.ellipse(image, centre, axes, rng.uniform(0, 180), 0, 360, rng.uniform(20, 235, 3).tolist(), -1, cv2.LINE_AA)
    image += rng.normal(0, 3, image.shape)
    alpha = cv2.circle(np.zeros((side, side), np.uint8), (side // 2, side // 2), side // 4, 255, -1)
    return np.dstack([np.clip(image, 0, 255).astype(np.uint8), alpha])


def milliseconds(image: np.ndarray, config: SparseContextConfig) -> dict[str, float]:
    runs = [select_tokens([image], [GRID], config).seconds * 1000 for _ in range(WARM_UP + RUNS)][WARM_UP:]
    low, median, high = np.percentile(runs, [10, 50, 90])
    figures = {"median": median, "p10": low, "p90": high, "min": min(runs), "max": max(runs)}
    return {name: round(float(value), 3) for name, value in figures.items()}


def selection() -> str:
    """The time of every selector, as a share of that of `edges`."""
    times = read("selection")["figures"]["milliseconds"]
    rows = [[f"{each['median'] / times['edges']['median']:.2f}" for each in times.values()]]
    return table([*times], rows)


TABLES = {
    "selection": selection,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Time token selection for a 1-megapixel reference on one core.")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "selection.json")
    parser.add_argument("--table", action="store_true", help="only draw the tables of results/ again, from the JSON")
    arguments = parser.parse_args()
    checkout()  # of the code that runs, whatever is committed meanwhile
    if arguments.table:
        return draw(TABLES)

    cv2.setNumThreads(1)
    image = picture()
    configs = {name: SparseContextConfig(selector=name) for name in SELECTORS}
    configs["edit"] = SparseContextConfig(task="edit")  # the tasks subject and global are selectors by themselves
    figures = {}
    print(f"{'selector or task':18}{'median':>10}{'p10':>10}{'p90':>10}   (ms)")
    for name, config in configs.items():
        figures[name] = milliseconds(image, config)
        print(f"{name:18}" + "".join(f"{figures[name][column]:10.2f}" for column in ("median", "p10", "p90")))
    settings = {
        "picture": [SIDE, SIDE],
        "grid": list(GRID),
        "keep": SparseContextConfig().keep,
        "runs": RUNS,
        "warm_up": WARM_UP,
        "threads": cv2.getNumThreads(),
    }
    write_result(arguments.output, "selection", settings, {"milliseconds": figures})
    draw(TABLES)
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
