"""How many tokens does an edit of the whole picture need? Quality just below all of them.

    python runs/global_keep.py [--scenes 24] [--keeps 0.95 0.9 0.8 0.7 0.5]

The embedded model without and with its adapter, on the edits of the whole picture among its held-out scenes (grey,
sepia, negative, warmer, posterised), with evenly spread tokens, as the task "global" chooses them; differences to the
dense base with all tokens, on the same noise. That keep="auto" keeps all under that task follows from it. Stopped at
any point, it goes on there.

It needs the scenes' objects: `python -m recipes.mini data`.
"""

import argparse
from pathlib import Path

from held_out import cell_rows, scene_maker
from tables import difference, draw, read, score_of, table

from recipes.mini.data import SPLITS, load_assets
from recipes.mini.samples import FIRST_SEED, scene_samples
from sparse_context.evaluation.evaluate import evaluate, fingerprint
from sparse_context.evaluation.grid import DENSE, grid
from sparse_context.evaluation.metrics import find_metrics
from sparse_context.evaluation.statistics import summarise
from sparse_context.pipelines.load import load
from sparse_context.pipelines.lora_file import NO_LORA
from sparse_context.pipelines.spec import ModelSpec
from sparse_context.result import checkout, write_result

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = {"training-free": NO_LORA, "fine-tuned": None}


def global_keep() -> str:
    """What an edit of the whole picture loses just below all tokens."""
    result = read("global_keep")
    keeps = [f"{keep:g}" for keep in result["config"]["keeps"]]
    rows = [
        [
            arm,
            difference(score_of(result["figures"], f"{arm}, {DENSE}", "psnr")) or "0",
            *(difference(score_of(result["figures"], f"{arm}, auto-{keep}", "psnr")) for keep in keeps),
        ]
        for arm in WEIGHTS
    ]
    return table(["weights", "all tokens", *keeps], rows)


TABLES = {
    "global_keep": global_keep,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Edits of the whole picture just below all tokens.")
    parser.add_argument("--split", choices=SPLITS[1:], default="validation")
    parser.add_argument("--scenes", type=int, default=24)
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.95, 0.9, 0.8, 0.7, 0.5])
    parser.add_argument("--assets", type=Path, default=ROOT / "checkpoints" / "assets.safetensors")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "global_keep.json")
    parser.add_argument("--table", action="store_true", help="only draw the tables of results/ again, from the JSON")
    arguments = parser.parse_args()
    checkout()  # of the code that runs, whatever is committed meanwhile
    if arguments.table:
        return draw(TABLES)

    assets = load_assets(arguments.assets).split(arguments.split)
    samples, scenes = scene_samples(assets, arguments.scenes, FIRST_SEED[arguments.split], ["edit_global"])
    cells, rows, weights = grid([1.0, *arguments.keeps]), {}, {}
    for name, lora in WEIGHTS.items():
        pipe = load(ModelSpec(lora=lora))
        make = scene_maker(pipe, scenes)
        folder = ROOT / "checkpoints" / f"{arguments.output.stem}-{arguments.split}" / name
        weights[name] = fingerprint(pipe)
        about = {"split": arguments.split, "weights": weights[name]}
        evaluate(make, samples, cells, find_metrics(["psnr"]), folder, about=about)
        for cell in cells:
            rows[f"{name}, {cell}"] = cell_rows(folder, cell)
    dense = rows.pop(f"training-free, {DENSE}")
    figures = summarise({DENSE: dense} | rows)["all"]
    for name, entry in figures.items():
        print(f"{name}: {entry['scores']['psnr']['difference']:+.2f} dB")
    config = {"split": arguments.split, "keeps": arguments.keeps, "weights": weights}
    write_result(arguments.output, arguments.output.stem, config, figures)
    draw(TABLES)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
