"""What it buys to spread a part of the kept tokens evenly: the picture around a subject, against the subject itself.

    python runs/coverage.py [--scenes 30] [--lora none]

Where all kept tokens lie on a subject, what surrounds it is unknown and the model makes it up (the paper shows such
backgrounds). `coverage` spends a share of the budget on evenly spread tokens instead. The embedded model on scenes that
have a picture to keep around their object: in front of a picture, and recoloured where it is; what is kept is else what
each task chooses by itself. Differences are to no coverage, scene by scene. Stopped at any point, it goes on there.

It needs the scenes' objects: `python -m recipes.mini data`.
"""

import argparse
from functools import partial
from pathlib import Path

from held_out import cell_rows, scene_maker
from tables import difference, draw, read, score_of, table

from recipes.mini.data import SPLITS, load_assets
from recipes.mini.samples import FIRST_SEED, scene_samples
from sparse_context.evaluation.evaluate import evaluate, fingerprint
from sparse_context.evaluation.grid import DENSE, grid
from sparse_context.evaluation.metrics import find_metrics
from sparse_context.evaluation.plots import draw_sheet
from sparse_context.evaluation.statistics import summarise
from sparse_context.images import save_picture
from sparse_context.pipelines.load import load
from sparse_context.pipelines.spec import ModelSpec
from sparse_context.result import checkout, write_result

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("subject_scene", "edit_object")
COVERAGES = (0.0, 0.1, 0.3)
SHOWN = (0, 3)  # scenes of either kind, and of different objects


def coverage(name: str = "coverage") -> str:
    """What evenly spread tokens among the kept ones buy, of the object and of the whole picture."""
    result = read(name)
    rows = []
    for group in ("subjects", "edits"):
        settings = result["figures"][group]
        for of, place in (("psnr_in_mask", "object"), ("psnr", "whole picture")):
            found = [difference(score_of(settings, setting, of)) for setting in settings if setting != DENSE]
            rows.append([group, place, f"{score_of(settings, DENSE, of)['mean']:.1f} dB", *found])
    return table(["task", "PSNR of", *(f"coverage {share:g}" for share in result["config"]["coverages"])], rows)


TABLES = {
    "coverage": coverage,
    "coverage_tuned": partial(coverage, "coverage_tuned"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="The embedded model with a share of its tokens spread evenly.")
    parser.add_argument("--split", choices=SPLITS[1:], default="validation")
    parser.add_argument("--lora", help="a file or the word none; the package's own without it")
    parser.add_argument("--keep", type=float, default=0.2)
    parser.add_argument("--scenes", type=int, default=30)
    parser.add_argument("--assets", type=Path, default=ROOT / "checkpoints" / "assets.safetensors")
    parser.add_argument("--pictures", type=Path, default=ROOT / "checkpoints", help="the folder for the sheet")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "coverage.json")
    parser.add_argument("--table", action="store_true", help="only draw the tables of results/ again, from the JSON")
    arguments = parser.parse_args()
    checkout()  # of the code that runs, whatever is committed meanwhile
    if arguments.table:
        return draw(TABLES)

    assets = load_assets(arguments.assets).split(arguments.split)
    samples, scenes = scene_samples(assets, arguments.scenes, FIRST_SEED[arguments.split], KINDS)
    pipe = load(ModelSpec(lora=arguments.lora))
    make = scene_maker(pipe, scenes)
    cells = grid((1.0, arguments.keep), coverages=COVERAGES)
    folder = ROOT / "checkpoints" / f"{arguments.output.stem}-{arguments.split}"
    about = {"split": arguments.split, "lora": arguments.lora or "the package's own", "weights": fingerprint(pipe)}
    evaluate(make, samples, cells, find_metrics(["psnr"]), folder, about=about)
    rows = {name: cell_rows(folder, name) for name in cells}
    without, *others = (name for name in cells if name != DENSE)
    figures = summarise({DENSE: rows[without]} | {name: rows[name] for name in others})
    config = about | {"keep": arguments.keep, "kinds": KINDS, "coverages": COVERAGES}
    write_result(arguments.output, arguments.output.stem, config, figures)
    draw(TABLES)
    sheet = draw_sheet(folder, [samples[i] for i in SHOWN], [without, *others])
    save_picture(sheet, arguments.pictures / f"{arguments.output.stem}.webp")
    for group, settings in figures.items():
        for name, entry in settings.items():
            scores = (f"{score} {entry['scores'][score]['difference']:+.2f}" for score in ("psnr_in_mask", "psnr"))
            print(f"{group}, {name}: {', '.join(scores)}")
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
