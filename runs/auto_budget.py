"""Does it help to adapt the budget to the picture? keep="auto" against a fixed ratio that keeps as many tokens.

    python runs/auto_budget.py [--scenes 40] [--lora none]

The embedded model, on the scenes of runs/peers.py and their noise; what is kept is what each task chooses by itself.
With keep="auto" each reference keeps the fewest tokens that hold the share `mass` of its scores, so that a picture with
a small subject keeps few. The fixed ratio beside it keeps, in each group of tasks, as many on average: a scene's score
there lies between those at the nearest ratios that were run, on a line over the logarithm of the ratio. Stopped at any
point, it goes on there.

It needs the scenes' objects: `python -m recipes.mini data`.
"""

import argparse
from functools import partial
from pathlib import Path

import numpy as np
from held_out import cell_rows, gain, scene_maker
from tables import SCORES, difference, draw, read, score_of, table

from recipes.mini.data import SPLITS, load_assets
from recipes.mini.samples import FIRST_SEED, scene_samples
from sparse_context.evaluation.evaluate import evaluate, fingerprint
from sparse_context.evaluation.grid import DENSE, grid
from sparse_context.evaluation.metrics import find_metrics
from sparse_context.evaluation.statistics import summarise
from sparse_context.pipelines.load import load
from sparse_context.pipelines.spec import ModelSpec
from sparse_context.result import checkout, write_result

ROOT = Path(__file__).resolve().parents[1]
FIXED = (1.0, 0.5, 0.3, 0.2, 0.1)


def between(rows: dict[float, list[dict]], shares: dict[str, float]) -> list[dict]:
    """What each scene would score at the share of its group, from its scores at fixed ratios."""
    ratios = sorted(rows)
    interpolated = []
    for scenes in zip(*(rows[ratio] for ratio in ratios), strict=True):
        share = shares[scenes[0]["task"]]
        known = [{name for name, value in scene["scores"].items() if value is not None} for scene in scenes]
        scores = {
            name: float(np.interp(np.log(share), np.log(ratios), [scene["scores"][name] for scene in scenes]))
            for name in sorted(set.intersection(*known))
        }
        interpolated.append(scenes[0] | {"scores": scores, "kept": round(share * scenes[0]["total"])})
    return interpolated


def auto_budget(name: str = "auto_budget") -> str:
    """What an adaptive budget gains over a fixed ratio of as many tokens; global edits keep all."""
    figures = read(name)["figures"]
    rows = []
    for group in ("subjects", "edits"):
        for mass, groups in figures.items():
            gained = difference(score_of(groups[group], "auto", SCORES[group]))
            rows.append([group, mass, f"{groups[group]['auto']['kept']:.0%}", gained])
    return table(["task", "mass", "kept", "auto against the fixed ratio"], rows)


TABLES = {
    "auto_budget": auto_budget,
    "auto_budget_tuned": partial(auto_budget, "auto_budget_tuned"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description='keep="auto" against fixed ratios, on the embedded model.')
    parser.add_argument("--split", choices=SPLITS[1:], default="validation")
    parser.add_argument("--lora", help="a file or the word none; the package's own without it")
    parser.add_argument("--masses", type=float, nargs="+", default=[0.8, 0.6, 0.4])
    parser.add_argument("--scenes", type=int, default=40)
    parser.add_argument("--assets", type=Path, default=ROOT / "checkpoints" / "assets.safetensors")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "auto_budget.json")
    parser.add_argument("--table", action="store_true", help="only draw the tables of results/ again, from the JSON")
    arguments = parser.parse_args()
    checkout()  # of the code that runs, whatever is committed meanwhile
    if arguments.table:
        return draw(TABLES)

    assets = load_assets(arguments.assets).split(arguments.split)
    samples, scenes = scene_samples(assets, arguments.scenes, FIRST_SEED[arguments.split])
    pipe = load(ModelSpec(lora=arguments.lora))
    make = scene_maker(pipe, scenes)
    folder = ROOT / "checkpoints" / f"{arguments.output.stem}-{arguments.split}"
    about = {"split": arguments.split, "lora": arguments.lora or "the package's own", "weights": fingerprint(pipe)}

    cells = grid(FIXED)
    for mass in arguments.masses:
        cells[f"mass-{mass:g}"] = grid(["auto"], mass=mass)["auto-auto"]
    evaluate(make, samples, cells, find_metrics(["psnr"]), folder, about=about)
    found = {cell: cell_rows(folder, cell) for cell in cells}
    fixed = {ratio: found[DENSE if ratio == 1 else f"auto-{ratio:g}"] for ratio in FIXED}
    figures = {}
    for mass in arguments.masses:
        adapted = found[f"mass-{mass:g}"]
        tasks = {row["task"] for row in adapted}
        shares = {
            task: float(np.mean([row["kept"] / row["total"] for row in adapted if row["task"] == task]))
            for task in tasks
        }
        compared = {DENSE: between(fixed, shares)}  # so that a difference is auto's gain
        compared["auto"] = [
            row | {"scores": {name: row["scores"][name] for name in alike["scores"]}}
            for row, alike in zip(adapted, compared[DENSE], strict=True)
        ]
        figures[f"{mass:g}"] = summarise(compared)
        for group, settings in figures[f"{mass:g}"].items():
            entry = settings["auto"]
            print(f"mass {mass:g}, {group}: keeps {entry['kept']:.3f}, {gain(entry, group)} dB")
    write_result(arguments.output, arguments.output.stem, about | {"masses": arguments.masses}, figures)
    draw(TABLES)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
