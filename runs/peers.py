"""Quality at equal numbers of tokens: sparse against references scaled down and against merged tokens.

    python runs/peers.py [--scenes 40] [--lora FILE]
    python runs/peers.py --keeps 0.444 0.25 0.111 --output results/peers_sides.json    # 192 pixels to 128, 96, 64

The embedded model without an adapter, on the scenes of runs/mini_curves.py and their noise. `sparse` keeps what each
task chooses by itself, and drops the rest or spends three tenths of its budget on averages of that; `sparse,
fine-tuned` drops it, with the package's adapter or the one named. `downscaled` and `merged` are those of the benchmark
(sparse_context/bench/methods.py). So all have the speed that their tokens allow, of which there are about as many: the
result says how many. Differences are to the dense model without an adapter and with all tokens, scene by scene, and
those of each method to `sparse`: PSNR inside the object or, for global edits, of the whole picture. Stopped at any
point, it goes on there.

`copied and filled` is no method but a yardstick: the model's picture with all tokens, of it the parts that `sparse` has
a token for or that the prompt alone determines, and the rest filled in from around by OpenCV's `inpaint` (Telea 2004).
Where `sparse` is below that, it made less of the tokens than copying and smooth filling would, and fine-tuning may
help; how far, it does not say, for what it copies was made with all tokens in sight.

It needs the scenes' objects: `python -m recipes.mini data`.
"""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from held_out import cell_rows, print_gains, scene_maker
from PIL import Image
from tables import SCORES, difference, draw, read, score_of, table

from recipes.mini.data import SPLITS, load_assets
from recipes.mini.samples import FIRST_SEED, scene_samples, tasks_of
from recipes.mini.scenes import TOKEN, Scene
from sparse_context.bench.methods import METHODS, make_pipes, reference_tokens
from sparse_context.config import SparseContextConfig
from sparse_context.evaluation.evaluate import evaluate, fingerprint
from sparse_context.evaluation.grid import DENSE, Cell, Maker, grid
from sparse_context.evaluation.metrics import find_metrics
from sparse_context.evaluation.statistics import summarise
from sparse_context.pipelines.embedded import ADAPTERS, adapter_record
from sparse_context.pipelines.engine import Generation
from sparse_context.pipelines.load import load
from sparse_context.pipelines.lora_file import NO_LORA
from sparse_context.pipelines.settings import call_inputs, call_settings
from sparse_context.pipelines.spec import ModelSpec
from sparse_context.pipelines.timing import Times, timed
from sparse_context.result import checkout, write_result
from sparse_context.samples import Sample
from sparse_context.selection import select_tokens

ROOT = Path(__file__).resolve().parents[1]
PEERS = ("downscaled", "merged")
TUNED = "sparse, fine-tuned"


def peer_maker(pipe, method: str) -> Maker:
    """How `evaluate` makes a sample by a method of the benchmark; the scenes' pictures have the model's sizes."""
    pipes = make_pipes(pipe)
    arguments = {name: value for name, value in call_settings(pipe).items() if name in call_inputs(pipe)}

    def make(sample: Sample, config: SparseContextConfig, seed: int) -> Generation:
        references = [picture.convert("RGB") for picture in sample.open_references()]
        prepared, pictures = METHODS[method].prepare(pipes, references, config.keep)
        with timed(prepared) as times:
            made = prepared(
                image=pictures,
                prompt=sample.prompt,
                generator=torch.Generator().manual_seed(seed),
                guidance_scale=1.0,
                **arguments,
            )
        image: Image.Image = made.images[0]
        return Generation(image, None, times)

    return make


def fill(picture: np.ndarray, known: np.ndarray) -> np.ndarray:
    """A picture, uint8 RGB (H, W, 3), with all but the `known` cells of a grid, bool (rows, columns), filled in."""
    if not known.any():
        return np.full_like(picture, 128)
    side = picture.shape[0] // known.shape[0], picture.shape[1] // known.shape[1]
    gaps = np.kron(~known, np.ones(side, np.uint8)).astype(np.uint8)
    return cv2.inpaint(picture, gaps, TOKEN, cv2.INPAINT_TELEA)


def filling_maker(scenes: Mapping[str, Scene], dense: Path) -> Maker:
    """`copied and filled`: from the outputs with all tokens, which `evaluate` keeps in the folder `dense`."""

    def make(sample: Sample, config: SparseContextConfig, seed: int) -> Generation:
        scene = scenes[sample.name]
        grids = [(picture.shape[0] // TOKEN, picture.shape[1] // TOKEN) for picture in scene.references]
        selection = select_tokens(scene.references, grids, replace(config, task=tasks_of(scene)))
        known = (scene.source < 0) | np.isin(scene.source, selection.index)
        picture = np.asarray(Image.open(dense / f"{sample.name}.png").convert("RGB"))
        return Generation(Image.fromarray(fill(picture, known)), selection, Times())

    return make


def peers(name: str = "peers") -> str:
    """Quality at equal numbers of tokens, and of the fine-tuned model with all tokens."""
    result = read(name)
    methods, figures = result["config"]["methods"], result["figures"]
    rows = []
    for group, of in SCORES.items():
        whole = difference(score_of(figures[group], f"{TUNED}, all tokens", of))
        rows.append([group, "1", *(whole if method == TUNED else "" for method in methods)])
        for keep in result["config"]["keeps"]:
            cells = [difference(score_of(figures[group], f"{method} {keep:g}", of)) for method in methods]
            rows.append([group, f"{keep:g}", *cells])
    return table(["task", "keep", *methods], rows)


def tokens() -> str:
    """How many reference tokens all scenes have together, by keep and method."""
    rows = []
    for name in ("peers", "peers_test", "peers_sides"):
        result = read(name)
        for keep in result["config"]["keeps"]:
            counts = result["figures"]["tokens"][f"{keep:g}"]
            rows.append([f"`{name}.json`", f"{keep:g}", *(str(counts[way]) for way in ("dense", "sparse", *PEERS))])
    return table(["result", "keep", "dense", "sparse", *PEERS], rows)


def pairs(name: str = "peers_sides") -> str:
    """The other ways against `sparse`, scene by scene."""
    result = read(name)
    ways = [way for way in result["config"]["methods"] if way not in ("sparse", "copied and filled")]
    rows = [
        [
            group,
            f"{keep:g}",
            *(difference(score_of(result["figures"]["against_sparse"][f"{keep:g}"][group], way, of)) for way in ways),
        ]
        for group, of in SCORES.items()
        for keep in result["config"]["keeps"]
    ]
    return table(["task", "keep", *ways], rows)


def chosen() -> str:
    """Dropping beside downscaling and merging on the test split, training-free and with as many tokens."""
    result = read("peers_test")
    rows = [
        [
            group,
            f"{keep:g}",
            *(
                difference(score_of(result["figures"][group], f"{way} {keep:g}", of))
                for way in ("sparse", "merged", "downscaled")
            ),
        ]
        for group, of in SCORES.items()
        for keep in (0.2, 0.1)
    ]
    return table(["task", "keep", "dropping", "merging", "downscaling"], rows)


TABLES = {
    "peers": peers,
    "peers_test": partial(peers, "peers_test"),
    "peers_sides": partial(peers, "peers_sides"),
    "peers_sides-pairs": pairs,
    "peers-tokens": tokens,
    "peers_test-chosen": chosen,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="The embedded model's quality at equal numbers of tokens.")
    parser.add_argument("--split", choices=SPLITS[1:], default="validation")
    parser.add_argument("--lora", help="a file or the word none; the package's own, if it has one, without it")
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.2, 0.15, 0.1])
    parser.add_argument("--scenes", type=int, default=40)
    parser.add_argument("--assets", type=Path, default=ROOT / "checkpoints" / "assets.safetensors")
    parser.add_argument("--folder", type=Path, help="working folder; checkpoints/NAME-SPLIT of the output without it")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "peers.json")
    parser.add_argument("--table", action="store_true", help="only draw the tables of results/ again, from the JSON")
    arguments = parser.parse_args()
    checkout()  # of the code that runs, whatever is committed meanwhile
    if arguments.table:
        return draw(TABLES)

    assets = load_assets(arguments.assets).split(arguments.split)
    samples, scenes = scene_samples(assets, arguments.scenes, FIRST_SEED[arguments.split])
    lora = arguments.lora or (ADAPTERS["plain"] if ADAPTERS["plain"].is_file() else NO_LORA)
    if lora != NO_LORA and not Path(lora).is_file():
        raise SystemExit(f"peers: {lora} is no file: name a LoRA, or none.")
    record = adapter_record(Path(lora)) if lora != NO_LORA else {}
    if record.get("kv"):
        raise SystemExit(f"peers: {lora} is a LoRA for KV mode: name one that `mini sparse` made without --kv.")
    pipe, tuned = load(ModelSpec(lora=NO_LORA)), load(ModelSpec(lora=str(lora)))
    weights = {"weights": fingerprint(tuned)}
    folder = arguments.folder or ROOT / "checkpoints" / f"{arguments.output.stem}-{arguments.split}"
    untrained, trained = (scene_maker(each, scenes) for each in (pipe, tuned))
    filled = filling_maker({name: scene for name, (scene, _, _) in scenes.items()}, folder / "dense")
    ways = {
        "sparse": (untrained, "equal", 0.0),
        **({TUNED: (trained, "equal", 0.0)} if record else {}),
        "sparse, 30 % averages": (untrained, "equal", 0.3),
        "sparse, one joint ranking": (untrained, "joint", 0.0),
        **({f"{TUNED}, one joint ranking": (trained, "joint", 0.0)} if record else {}),
        **{method: (peer_maker(pipe, method), "joint", 0.0) for method in PEERS},  # to which these mean nothing
        "copied and filled": (filled, "equal", 0.0),
    }
    cells = grid([1.0])
    for keep in arguments.keeps:
        for method, (make, share, merge) in ways.items():
            config = SparseContextConfig(keep=keep, share=share, merge=merge)
            about = {"method": method} | (weights if method.startswith(TUNED) else {})
            cells[f"{method} {keep:g}"] = Cell(config, make=make, about=about)
    if record:
        cells[f"{TUNED}, all tokens"] = Cell(SparseContextConfig(keep=1.0), make=trained, about=weights)
    about = {"split": arguments.split, "lora": NO_LORA, "weights": fingerprint(pipe)}
    result = evaluate(untrained, samples, cells, find_metrics(["psnr"]), folder, about=about)

    def rows(way: str, keep: float) -> list[dict]:
        return cell_rows(folder, f"{way} {keep:g}")

    grids = [[(r.shape[0] // TOKEN, r.shape[1] // TOKEN) for r in scene.references] for scene, _, _ in scenes.values()]
    figures = result["figures"] | {
        "against_sparse": {
            f"{keep:g}": summarise({DENSE: rows("sparse", keep)} | {way: rows(way, keep) for way in ways})
            for keep in arguments.keeps
        },
        "tokens": {
            f"{keep:g}": {
                method: sum(reference_tokens(method, each, keep) for each in grids)
                for method in ("dense", "sparse", *PEERS)
            }
            for keep in arguments.keeps
        },
    }
    config = about | {"keeps": arguments.keeps, "methods": list(ways), "adapter": record}
    write_result(arguments.output, arguments.output.stem, config, figures)
    draw(TABLES)
    print_gains(result["figures"])
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
