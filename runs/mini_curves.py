"""The embedded model's quality against the tokens kept: subjects, edits and global edits apart, on held-out scenes.

`--scenes` of them at keep 1, 0.2 and 0.1 and the first `--few` at the other keeps, for six selectors, for what each
task chooses itself, and for that with three tenths of the budget spent on averages of the rest; `mask` knows where the
object is. The defaults take some hours; what was published has its numbers in its record. `recognised` is that of
base_quality.py: the share of a scene's objects that are nearest to themselves among 64 candidates. PSNR, which the
tables and pictures are made of, is always measured, and `--metrics` names what else. Stopped at any point, it goes on
there. Settings are chosen on "validation"; "test" is run for the published table, once a release.

    python runs/mini_curves.py --lora none --output results/mini_curves_base.json
    python runs/mini_curves.py --split test --lora none --output results/mini_curves_base_test.json
    python runs/mini_curves.py --base results/mini_curves_base.json
    python runs/mini_curves.py --split test --base results/mini_curves_base_test.json \\
        --output results/mini_curves_test.json --pictures checkpoints/mini_curves_test-test

The first line is the dense base, training-free, and the second that on the test split. The third is the model as it is
shipped, fine-tuned with dropping: its figures are also compared with the base's outputs with all tokens, pair by pair,
and drawn beside the base's; the last line is that on the test split. What the tasks choose is compared with random
tokens, pair by pair, too, and subjects are told apart by whether all of their objects was kept.

It needs the scenes' objects, `checkpoints/assets.safetensors`: `python -m sparse_context.mini data` makes that file.
"""

import argparse
import json
import math
import sys
from collections.abc import Collection
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import torch
from base_quality import objects, with_other_objects
from PIL import Image

from sparse_context.evaluation.evaluate import DENSE, evaluate, fingerprint, grid, maker, summarise, table
from sparse_context.evaluation.metrics import Metric, decoys, features, find_metrics, nearest_of
from sparse_context.evaluation.plots import draw_curves, draw_sheet
from sparse_context.generation import NO_LORA, call_settings, load_pipeline
from sparse_context.images import save_picture
from sparse_context.mini import ADAPTERS
from sparse_context.mini.data import SPLITS, load_assets
from sparse_context.mini.samples import FIRST_SEED, scene_samples, tasks_of
from sparse_context.mini.scenes import Scene
from sparse_context.result import write_result
from sparse_context.selection import SparseContextConfig, select_tokens

ROOT = Path(__file__).resolve().parents[1]
SELECTORS = ("random", "uniform", "edges", "saliency", "subject", "mask")
MERGES = (0.0, 0.3)  # beside what the tasks choose themselves
WHOLE = 0.99  # of an object's area
MANY, FEW = (1.0, 0.2, 0.1), (0.5, 0.3, 0.15, 0.05)
SHEET = tuple(name for name in grid((0.5, 0.2, 0.1)) if name != DENSE)


def working_folder(output: Path, split: str) -> Path:
    """Where a run keeps what it goes on from."""
    return ROOT / "checkpoints" / f"{output.stem}-{split}"


def rows(folder: Path, cell: str) -> list[dict]:
    """The figures of every scene under one setting."""
    return json.loads((folder / "cells" / f"{cell}.json").read_text(encoding="utf-8"))["figures"]["samples"]


def share_kept(scene: Scene, keep: float, token: int) -> float:
    """The share of a scene's object that is kept in its reference, of the object of which least is."""
    grids = [(picture.shape[0] // token, picture.shape[1] // token) for picture in scene.references]
    selection = select_tokens(scene.references, grids, SparseContextConfig(keep=keep, task=tasks_of(scene)))
    shares = []
    for kept, mask in zip(selection.references, scene.reference_masks, strict=True):
        covered = cv2.resize(mask.astype(np.float32), kept.grid[::-1], interpolation=cv2.INTER_AREA).ravel()
        if covered.min() < 1:  # else it is a picture to stand behind the object
            shares.append(float(covered[kept.index].sum() / covered.sum()))
    return min(shares)


def read_base(path: Path, about: dict, names: list[str]) -> dict:
    """The result of the dense base, as `evaluate` returns it. Ends the script where it is none for these scenes."""
    base = json.loads(path.read_text(encoding="utf-8"))
    config, folder = base["config"], working_folder(path, about["split"])
    differs = [key for key in ("split", "steps", "call") if config[key] != about[key]]
    if config["lora"] != NO_LORA or config["weights"] == about["weights"] or differs:
        sys.exit(
            f"mini_curves: {path} is no result of the dense base with the same settings ({differs or 'its LoRA'})."
        )
    if not (folder / "cells").is_dir() or [row["name"] for row in rows(folder, DENSE)] != names:
        sys.exit(f"mini_curves: {folder} has no figures of the dense base for these {len(names)} scenes: run it first.")
    return base | {"figures": base["figures"]["groups"]}


def main() -> None:
    parser = argparse.ArgumentParser(description="The embedded model's quality against the tokens kept.")
    parser.add_argument("--split", choices=SPLITS[1:], default="validation")
    parser.add_argument("--model", help="a folder; the weights in the package without it")
    parser.add_argument(
        "--lora", help="an adapter for it, as safetensors, or the word none; the package's own without both"
    )
    parser.add_argument("--scenes", type=int, default=256, help=f"at keep {MANY}")
    parser.add_argument("--few", type=int, default=64, help=f"at keep {FEW}")
    parser.add_argument(
        "--metrics",
        nargs="*",
        default=["ssim", "st_lpips", "identity", "recognised"],
        help="beside psnr; fewer are quicker",
    )
    parser.add_argument("--base", type=Path, help="the result of another run on the same scenes, of the dense base")
    parser.add_argument("--steps", type=int, help="denoise steps; the model's own without it")
    parser.add_argument("--assets", type=Path, default=ROOT / "checkpoints" / "assets.safetensors")
    parser.add_argument(
        "--folder", type=Path, help="working folder; checkpoints/NAME-SPLIT of the output's NAME without it"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "mini_curves.json")
    parser.add_argument(
        "--pictures", type=Path, help="a folder; docs/ for the package's own adapter, else the working one"
    )
    arguments = parser.parse_args()

    assets = load_assets(arguments.assets).split(arguments.split)
    samples, scenes = scene_samples(assets, arguments.scenes, FIRST_SEED[arguments.split])
    of_truth = {scene.target.tobytes(): (scene, kind, seed) for scene, kind, seed in scenes.values()}

    @cache  # 0.3 MB an object, and some 350 objects, which every setting is asked about
    def candidates(truth: bytes) -> list[tuple[np.ndarray, torch.Tensor]]:
        """The mask of each object of a scene, and the features of its 64 candidates, itself first."""
        scene, kind, seed = of_truth[truth]
        others = with_other_objects(assets, kind, seed)
        return [(m, features([scene.target, *decoys(scene.target, m), *others], m)) for m in objects(scene)]

    def share_recognised(output: Image.Image, truth: Image.Image, mask: Image.Image | None = None) -> float:
        """Of the objects of a scene; nan without a mask, and for global edits, which nothing else was put through."""
        found = of_truth.get(np.asarray(truth).tobytes())
        if mask is None or found is None or found[1] == "edit_global":
            return math.nan
        known = candidates(found[0].target.tobytes())
        return float(np.mean([nearest_of(features([output], m)[0], others) == 0 for m, others in known]))

    metrics = find_metrics(["psnr", *(name for name in arguments.metrics if name != "recognised")])
    if "recognised" in arguments.metrics:
        metrics["recognised"] = Metric(share_recognised)

    pipe = load_pipeline(arguments.model, lora=arguments.lora)
    pipe.set_progress_bar_config(disable=True)
    make = maker(pipe, steps=arguments.steps, task_of=lambda sample: tasks_of(scenes[sample.name][0]))
    limits = dict.fromkeys(MANY, arguments.scenes) | dict.fromkeys(FEW, arguments.few)
    keeps = sorted(limits, reverse=True)
    cells = grid(keeps, merges=MERGES, limits=limits) | grid(keeps, SELECTORS, limits=limits)
    own = arguments.model is None and arguments.lora is None
    if own and not ADAPTERS["plain"].is_file():
        sys.exit(
            f"mini_curves: {ADAPTERS['plain']} is not there, so this would measure the dense base: "
            "pass --lora none for that."
        )
    about = {"split": arguments.split, "model": arguments.model or "embedded",
             "lora": "the package's own" if own else arguments.lora or NO_LORA, "weights": fingerprint(pipe),
             "steps": arguments.steps, "call": call_settings(pipe)}  # fmt: skip
    base = None if arguments.base is None else read_base(arguments.base, about, [sample.name for sample in samples])
    folder = arguments.folder or working_folder(arguments.output, arguments.split)
    result = evaluate(make, samples, cells, metrics, folder, about=about)
    dense_folder = folder if arguments.base is None else working_folder(arguments.base, arguments.split)

    def gains(keep: float, than: Path, cell: str, names: Collection[str] = scenes) -> dict:
        """What the tasks' own choice at `keep` wins over `cell` of the run in the folder `than`, scene by scene."""
        pair = {DENSE: rows(than, cell), "auto": rows(folder, f"auto-{keep:g}")}
        return summarise({name: [row for row in found if row["name"] in names] for name, found in pair.items()})

    figures = {
        "groups": result["figures"],
        "over random": {f"{keep:g}": gains(keep, folder, f"random-{keep:g}") for keep in keeps[1:]},
        "subjects by what was kept": {},
    }
    subjects = {sample.name: scenes[sample.name][0] for sample in samples if sample.task == "subjects"}
    for keep in MANY[1:]:
        shares = {name: share_kept(scene, keep, 2 * pipe.vae_scale_factor) for name, scene in subjects.items()}
        whole = {name for name, share in shares.items() if share >= WHOLE}
        figures["subjects by what was kept"][f"{keep:g}"] = {
            part: gains(keep, dense_folder, DENSE, names)["all"]
            for part, names in (("whole", whole), ("in part", shares.keys() - whole))
            if names
        }
    if base is not None:
        figures["to the dense base"] = summarise(
            {DENSE: rows(dense_folder, DENSE), "all tokens": rows(folder, DENSE)}
            | {name: rows(folder, name) for name in cells if name != DENSE}
        )
        figures["won by fine-tuning"] = {f"{keep:g}": gains(keep, dense_folder, f"auto-{keep:g}") for keep in keeps[1:]}
    write_result(arguments.output, arguments.output.stem, result["config"], figures)

    pictures = arguments.pictures or (ROOT / "docs" if own else folder)
    pictures.mkdir(parents=True, exist_ok=True)
    for score in ("psnr", "psnr_in_mask"):
        save_picture(draw_curves(result, score, base), pictures / f"{arguments.output.stem}-{score}.webp")
    save_picture(draw_sheet(folder, samples[: arguments.few], SHEET), pictures / f"{arguments.output.stem}-sheet.webp")
    print(table(result))
    dense = result["figures"]["all"][DENSE]
    print(f"{dense['samples']} scenes of {arguments.split}; wrote {arguments.output} and pictures in {pictures}")


if __name__ == "__main__":
    main()
