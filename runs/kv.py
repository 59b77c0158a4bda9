"""KV mode: the embedded model with references that go through it once, before and after it was fine-tuned for that.

    python runs/kv.py [--lora FILE] [--scenes 40]

`Flux2KleinKVPipeline` computes the keys and values of the references in the first step, where they look at each other
alone, and reuses them in all others. Weights that were not trained for it lose by that. `python -m recipes.mini
sparse --kv` trains a LoRA for it, on dropped tokens too, so that both savings come together; the plain pipeline has the
package's other LoRA, for dropped tokens. Each way is measured with all tokens and at some keeps, on the scenes of
runs/mini_curves.py and their noise; differences are to the plain pipeline on the base with all tokens, scene by scene.
Stopped at any point, it goes on there.

It needs the scenes' objects: `python -m recipes.mini data`.
"""

import argparse
from functools import partial
from pathlib import Path

from held_out import print_gains, scene_maker
from tables import SCORES, difference, draw, read, score_of, table

from recipes.mini.data import SPLITS, load_assets
from recipes.mini.samples import FIRST_SEED, scene_samples
from sparse_context.config import SparseContextConfig
from sparse_context.evaluation.evaluate import evaluate, fingerprint
from sparse_context.evaluation.grid import Cell, grid
from sparse_context.evaluation.metrics import find_metrics
from sparse_context.pipelines.embedded import ADAPTERS, adapter_record
from sparse_context.pipelines.load import load
from sparse_context.pipelines.lora_file import NO_LORA
from sparse_context.pipelines.spec import ModelSpec
from sparse_context.result import checkout, write_result

ROOT = Path(__file__).resolve().parents[1]


def kv(name: str = "kv") -> str:
    """What KV mode costs, before and after a fine-tuning for it."""
    figures = read(name)["figures"]
    ways = [way for way in figures["all"] if way != "dense"]
    return table(
        ["weights and tokens", *SCORES],
        ([way, *(difference(score_of(figures[group], way, of)) for group, of in SCORES.items())] for way in ways),
    )


TABLES = {
    "kv": kv,
    "kv_test": partial(kv, "kv_test"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="The embedded model in KV mode, before and after fine-tuning.")
    parser.add_argument("--split", choices=SPLITS[1:], default="validation")
    parser.add_argument("--lora", type=Path, default=ADAPTERS["kv"], help="the package's own without it")
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.2, 0.15, 0.1])
    parser.add_argument("--scenes", type=int, default=40)
    parser.add_argument("--checkpoints", type=Path, default=ROOT / "checkpoints", help="the working folder")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "kv.json")
    parser.add_argument("--table", action="store_true", help="only draw the tables of results/ again, from the JSON")
    arguments = parser.parse_args()
    checkout()  # of the code that runs, whatever is committed meanwhile
    if arguments.table:
        return draw(TABLES)

    assets = load_assets(arguments.checkpoints / "assets.safetensors").split(arguments.split)
    samples, scenes = scene_samples(assets, arguments.scenes, FIRST_SEED[arguments.split])
    record = adapter_record(arguments.lora) if arguments.lora.is_file() else {}
    if not record.get("kv"):
        raise SystemExit(f"kv: {arguments.lora} is no LoRA for KV mode: name one that `sparse --kv` made.")
    plain, untrained = load(ModelSpec(lora=NO_LORA)), load(ModelSpec(lora=NO_LORA, kv=True))
    tuned = load(ModelSpec(lora=str(arguments.lora), kv=True))
    plain_tuned = load(ModelSpec(lora=str(ADAPTERS["plain"]))) if ADAPTERS["plain"].is_file() else None

    about = {"split": arguments.split, "weights": fingerprint(plain)}
    ways = {"plain": (scene_maker(plain, scenes), {})}
    if plain_tuned is not None:
        ways["plain, fine-tuned"] = (scene_maker(plain_tuned, scenes), {"weights": fingerprint(plain_tuned)})
    ways |= {
        "KV": (scene_maker(untrained, scenes), {"kv": True}),
        "KV, fine-tuned": (scene_maker(tuned, scenes), {"kv": True, "weights": fingerprint(tuned)}),
    }
    cells = grid([1.0])
    for way, (how, of) in ways.items():
        for keep in [1.0, *arguments.keeps]:
            if (way, keep) != ("plain", 1.0):
                name = f"{way}, {'all tokens' if keep == 1 else f'keep {keep:g}'}"
                cells[name] = Cell(SparseContextConfig(keep=keep), make=how, about=of)
    folder = arguments.checkpoints / f"{arguments.output.stem}-{arguments.split}"
    figures = evaluate(ways["plain"][0], samples, cells, find_metrics(["psnr"]), folder, about=about)["figures"]
    config = {"split": arguments.split, "keeps": arguments.keeps, "adapter": record}
    write_result(arguments.output, arguments.output.stem, config, figures)
    draw(TABLES)
    print_gains(figures)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
