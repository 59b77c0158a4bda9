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
        --output results/mini_curves_test.json

The first line is the dense base, training-free, and the second that on the test split. The third is the model as it is
shipped, fine-tuned with dropping: its figures are also compared with the base's outputs with all tokens, pair by pair,
and drawn beside the base's; the last line is that on the test split. What the tasks choose is compared with random
tokens, pair by pair, too, and subjects are told apart by whether all of their objects was kept.

It needs the scenes' objects, `checkpoints/assets.safetensors`: `python -m recipes.mini data` makes that file.
"""

import argparse
import json
import math
import sys
from collections.abc import Collection
from functools import cache, partial
from pathlib import Path

import cv2
import numpy as np
import torch
from base_quality import objects, with_other_objects
from held_out import scene_maker
from PIL import Image
from tables import SCORES, difference, draw, read, score_of
from tables import table as markdown

from recipes.mini.data import SPLITS, load_assets
from recipes.mini.samples import FIRST_SEED, scene_samples, tasks_of
from recipes.mini.scenes import Scene
from sparse_context.config import SparseContextConfig
from sparse_context.evaluation.evaluate import evaluate, fingerprint
from sparse_context.evaluation.grid import DENSE, grid
from sparse_context.evaluation.metrics import Metric, decoys, features, find_metrics, nearest_of
from sparse_context.evaluation.plots import draw_curves, draw_sheet
from sparse_context.evaluation.report import table
from sparse_context.evaluation.statistics import summarise
from sparse_context.images import save_picture
from sparse_context.pipelines.embedded import ADAPTERS
from sparse_context.pipelines.load import load
from sparse_context.pipelines.lora_file import NO_LORA
from sparse_context.pipelines.settings import call_settings
from sparse_context.pipelines.spec import ModelSpec
from sparse_context.result import checkout, write_result
from sparse_context.selection import select_tokens

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


OWN = "task default"
RESULTS = ("mini_curves_base", "mini_curves", "mini_curves_base_test", "mini_curves_test")


def weights(result: dict) -> str:
    return "training-free" if result["config"]["lora"] == NO_LORA else "fine-tuned"


def lines(result: dict) -> dict[str, dict[float, str]]:
    """The settings of a result by line of the curves and keep."""
    found: dict[str, dict[float, str]] = {}
    for name, cell in result["config"]["cells"].items():
        if name != DENSE:
            line = OWN if cell["selector"] == "auto" else cell["selector"]
            line += f", coverage {cell['coverage']:g}" if cell["coverage"] else ""
            line += f", merge {cell['merge']:g}" if cell.get("merge") else ""
            found.setdefault(line, {})[cell["keep"]] = name
    return found


def curves(name: str) -> str:
    """Every selector at every keep, against the dense base with all tokens."""
    result = read(name)
    found = lines(result)
    against = "groups" if weights(result) == "training-free" else "against_dense_base"
    keeps = sorted({keep for line in found.values() for keep in line}, reverse=True)
    rows = []
    for group, of in SCORES.items():
        settings = result["figures"][against][group]
        dense = score_of(settings, DENSE, of)
        full = difference(score_of(settings, "all tokens", of)) or f"{dense['mean']:.1f} dB"
        rows.append([f"{group} ({dense['n']})", "1", full, *[""] * (len(found) - 1)])
        for keep in keeps:
            cells = (difference(score_of(settings, line.get(keep, ""), of)) for line in found.values())
            rows.append([group, f"{keep:g}", *cells])
    return markdown(["task (scenes)", "keep", *found], rows)


def by_keep() -> str:
    """What each task loses by keep, with its own choice of tokens: test split, before and after the fine-tuning."""
    results = (read("mini_curves_base_test"), read("mini_curves_test"))
    rows = []
    for group, of in SCORES.items():
        for result in results:
            settings = result["figures"]["groups" if result is results[0] else "against_dense_base"][group]
            full = difference(score_of(settings, "all tokens", of), interval=False)
            rows.append(
                [group, weights(result), full or f"{score_of(settings, DENSE, of)['mean']:.1f} dB"]
                + [difference(score_of(settings, f"auto-{keep}", of), interval=False) for keep in ("0.5", "0.2", "0.1")]
                + [difference(score_of(settings, "random-0.1", of), interval=False)]
            )
    head = ["task", "weights", "all tokens", "keep 0.5", "keep 0.2", "keep 0.1", "keep 0.1, at random"]
    return markdown(head, rows)


def by_selector() -> str:
    """The selectors side by side at a fifth of the tokens: test split, fine-tuned."""
    settings = read("mini_curves_test")["figures"]["against_dense_base"]
    rows = [
        [named, *(difference(score_of(settings[group], f"{selector}-0.2", of)) for group, of in SCORES.items())]
        for named, selector in {OWN: "auto", **{f"`{selector}`": selector for selector in SELECTORS}}.items()
    ]
    return markdown(["selector", *SCORES], rows)


def over_random() -> str:
    """What the tasks' own choice wins over random tokens."""
    columns = [*SCORES.items(), ("edits", "psnr")]
    rows = []
    for result in map(read, RESULTS):
        for keep in ("0.2", "0.1"):
            groups = result["figures"]["over_random"][keep]
            won = (difference(score_of(groups[group], "auto", of)) for group, of in columns)
            rows.append([weights(result), result["config"]["split"], keep, *won])
    return markdown(["weights", "split", "keep", *SCORES, "edits, whole picture"], rows)


def recognised() -> str:
    """How often an object is nearest to itself, by keep and selector: test split."""
    kinds, keeps = {OWN: "auto", "random": "random", "mask": "mask"}, ("0.5", "0.2", "0.1")
    cells = [DENSE, *(f"{kind}-{keep}" for kind in kinds.values() for keep in keeps)]
    rows = []
    for result in map(read, RESULTS[2:]):
        for group in ("subjects", "edits"):
            figures = result["figures"]["groups"][group]
            shares = (f"{score_of(figures, cell, 'recognised_in_mask')['mean']:.0%}" for cell in cells)
            rows.append([weights(result), group, *shares])
    return markdown(["weights", "objects of", "all tokens", *(f"{k}, {keep}" for k in kinds for keep in keeps)], rows)


def by_kept() -> str:
    """What subjects lose where all of their objects was kept, and where it was not."""
    rows = []
    for result in map(read, RESULTS):
        for keep, parts in result["figures"]["recognised_by_share_kept"].items():
            cells = [
                f"{difference(score_of(parts[part], 'auto', 'psnr_in_mask'))}, {parts[part]['auto']['samples']} scenes"
                if part in parts
                else ""
                for part in ("whole", "in_part")
            ]
            rows.append([weights(result), result["config"]["split"], keep, *cells])
    return markdown(["weights", "split", "keep", "objects kept whole", "objects kept in part"], rows)


def tuned() -> str:
    """What the adapter wins over the training-free base with the same tokens."""
    rows = []
    for result in (read("mini_curves"), read("mini_curves_test")):
        for keep in ("0.5", "0.2", "0.1"):
            groups = result["figures"]["gain_of_fine_tuning"][keep]
            won = (difference(score_of(groups[group], "auto", of)) for group, of in SCORES.items())
            rows.append([result["config"]["split"], keep, *won])
    return markdown(["split", "keep", *SCORES], rows)


def other_scores() -> str:
    """What else was measured, before and after the fine-tuning: validation split."""
    results = (read("mini_curves_base"), read("mini_curves"))
    kinds = {"ssim": "SSIM", "st_lpips": "ST-LPIPS", "identity": "identity", "psnr_to_dense": "PSNR to all tokens"}
    cells = {
        "all tokens": DENSE,
        "keep 0.2": "auto-0.2",
        "keep 0.1": "auto-0.1",
        "random, 0.2": "random-0.2",
        "random, 0.1": "random-0.1",
    }

    def mean(entry: dict, digits: int) -> str:
        low, high = entry["interval"]
        return f"{entry['mean']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"

    rows = []
    for kind, shown in kinds.items():
        for group, of in SCORES.items():
            for result in results:
                name = kind if kind.endswith("to_dense") else kind + of.removeprefix("psnr")
                found = (score_of(result["figures"]["groups"][group], cell, name) for cell in cells.values())
                means = (mean(entry, 1 if "psnr" in kind else 2) if entry else "" for entry in found)
                rows.append([shown, group, weights(result), *means])
    return markdown(["score", "of", "weights", *cells], rows)


TABLES = {
    "mini_curves_base": partial(curves, "mini_curves_base"),
    "mini_curves_base_test": partial(curves, "mini_curves_base_test"),
    "mini_curves": partial(curves, "mini_curves"),
    "mini_curves_test": partial(curves, "mini_curves_test"),
    "mini_curves-keep": by_keep,
    "mini_curves-selectors": by_selector,
    "mini_curves-over-random": over_random,
    "mini_curves-recognised": recognised,
    "mini_curves-kept": by_kept,
    "mini_curves-tuned": tuned,
    "mini_curves-scores": other_scores,
}


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
    parser.add_argument("--pictures", type=Path, help="a folder; the working one without it")
    parser.add_argument("--table", action="store_true", help="only draw the tables of results/ again, from the JSON")
    arguments = parser.parse_args()
    checkout()  # of the code that runs, whatever is committed meanwhile
    if arguments.table:
        return draw(TABLES)

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

    pipe = load(ModelSpec(arguments.model, lora=arguments.lora))
    make = scene_maker(pipe, scenes, steps=arguments.steps)
    limits = dict.fromkeys(MANY, arguments.scenes) | dict.fromkeys(FEW, arguments.few)
    keeps = sorted(limits, reverse=True)
    cells = grid(keeps, merges=MERGES, limits=limits) | grid(keeps, SELECTORS, limits=limits)
    own = arguments.model is None and arguments.lora is None
    if own and not ADAPTERS["plain"].is_file():
        sys.exit(
            f"mini_curves: {ADAPTERS['plain']} is not there, so this would measure the dense base: "
            "pass --lora none for that."
        )
    about = {
        "split": arguments.split,
        "model": arguments.model or "embedded",
        "lora": "the package's own" if own else arguments.lora or NO_LORA,
        "weights": fingerprint(pipe),
        "steps": arguments.steps,
        "call": call_settings(pipe),
    }
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
        "over_random": {f"{keep:g}": gains(keep, folder, f"random-{keep:g}") for keep in keeps[1:]},
        "recognised_by_share_kept": {},
    }
    subjects = {sample.name: scenes[sample.name][0] for sample in samples if sample.task == "subjects"}
    for keep in MANY[1:]:
        shares = {name: share_kept(scene, keep, 2 * pipe.vae_scale_factor) for name, scene in subjects.items()}
        whole = {name for name, share in shares.items() if share >= WHOLE}
        figures["recognised_by_share_kept"][f"{keep:g}"] = {
            part: gains(keep, dense_folder, DENSE, names)["all"]
            for part, names in (("whole", whole), ("in_part", shares.keys() - whole))
            if names
        }
    if base is not None:
        figures["against_dense_base"] = summarise(
            {DENSE: rows(dense_folder, DENSE), "all tokens": rows(folder, DENSE)}
            | {name: rows(folder, name) for name in cells if name != DENSE}
        )
        figures["gain_of_fine_tuning"] = {
            f"{keep:g}": gains(keep, dense_folder, f"auto-{keep:g}") for keep in keeps[1:]
        }
    write_result(arguments.output, arguments.output.stem, result["config"], figures)
    draw(TABLES)

    pictures = arguments.pictures or folder
    pictures.mkdir(parents=True, exist_ok=True)
    for score in ("psnr", "psnr_in_mask"):
        save_picture(draw_curves(result, score_of, base), pictures / f"{arguments.output.stem}-{score}.webp")
    save_picture(draw_sheet(folder, samples[: arguments.few], SHEET), pictures / f"{arguments.output.stem}-sheet.webp")
    print(table(result))
    dense = result["figures"]["all"][DENSE]
    print(f"{dense['samples']} scenes of {arguments.split}; wrote {arguments.output} and pictures in {pictures}")


if __name__ == "__main__":
    main()
