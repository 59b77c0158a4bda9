"""How well the selector `saliency` and its net find subjects, beside what needs no net, and how long it takes.

    python -m recipes.mini data
    pip install scikit-image                # five of the photographs
    python runs/saliency.py [--folder checkpoints] [--output results/saliency.json] [--sheet checkpoints/saliency.webp]

Nothing that is scored here was trained on:

- composites of clip art, a source that the net never saw, on backdrops of the validation and test splits and on
  textures: against their exact masks, on 16-pixel tokens.
- real photographs with boxes drawn by hand around their subjects (`saliency_boxes.json`; several boxes follow one
  subject), in which every box corner is a mistake that no selector can avoid. Those of GCompris are of all splits, but
  not among the backdrops of the training composites; the others are from scikit-image. The net was not tuned on them.
  That the selector averages net and contrast, equally, was chosen on every second one: the *chosen on* half. The
  other half, *not chosen on*, is the one to believe. `subject` is the selector of that name, saliency with outline and
  rim; its weights were chosen on the embedded model's scenes, with an eye on all of these.

*Recall* at a keep ratio: the kept tokens' share of the subject, over the largest share that so many tokens can have. A
token counts by its covered share. 1 is perfect, and chance is what `uniform` gets.

- the embedded model's references, where the object was pasted onto a texture or a photograph. Some photographs show a
  thing of their own, which nothing but the prompt tells from the object: how many objects `subject` keeps whole is
  counted apart by what is behind them.

*Ratio to edges*: CPU time of one thread, both end to end through `select_tokens`, turn by turn, on the picture of
`time_selection.py`.
"""

import os

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")  # read when the libraries load

import argparse
import importlib.util
import json
import math
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from tables import draw, read, table
from time_selection import GRID, picture
from tqdm import tqdm

from recipes.mini import scenes
from recipes.mini.data import SPLITS, Assets, load_assets
from recipes.mini.saliency_net import BACKDROPS, composite, held_out_sources
from recipes.mini.samples import FIRST_SEED, scene_samples
from recipes.mini.scenes import make_scene
from sparse_context.config import SparseContextConfig
from sparse_context.images import save_picture
from sparse_context.result import checkout, write_result
from sparse_context.selection import select_tokens
from sparse_context.selectors.registry import SELECTORS
from sparse_context.selectors.saliency import WEIGHTS, load_net, net_map, saliency_map

ROOT = Path(__file__).resolve().parents[1]
KEEPS = (0.1, 0.2, 0.4)
COMPOSITES, SIZE, TOKEN = 200, 256, 16
WARM_UP, RUNS = 3, 30
SCENES = 256  # as many as runs/mini_curves.py takes
WHOLE = 0.99  # of an object's area
BEHIND = ("a texture", "a place", "a thing")


def centre(image, grid, generator):
    """The centre prior: nearer to the middle is better, and nothing else."""
    y, x = (np.abs(np.arange(n) + 0.5 - n / 2) / (n / 2) for n in grid)
    return (1 - np.hypot(y[:, None], x[None]) / math.sqrt(2)).astype(np.float32)


def net(image, grid, generator):
    """The net alone, without contrast."""
    return np.clip(cv2.resize(net_map(image), grid[::-1], interpolation=cv2.INTER_AREA), 0, 1)


RIVALS = {
    "saliency": "saliency",
    "subject": "subject",
    "net": net,
    "contrast": "contrast",
    "edges": "edges",
    "centre": centre,
    "uniform": "uniform",
}


def token_grid(height: int, width: int) -> tuple[int, int]:
    return max(1, round(height / TOKEN)), max(1, round(width / TOKEN))


def recalls(image: np.ndarray, truth: np.ndarray, selector) -> dict[str, float]:
    """Recall at each of `KEEPS`; `truth` is the subject, float32 (H, W) in [0, 1]."""
    grid = token_grid(*truth.shape)
    covered = cv2.resize(truth, grid[::-1], interpolation=cv2.INTER_AREA).ravel()
    found = {}
    for keep in KEEPS:
        kept = select_tokens([image], [grid], SparseContextConfig(keep=keep, selector=selector)).index
        best = np.sort(covered)[::-1][: len(kept)].sum()
        found[str(keep)] = float(covered[kept].sum() / best)
    return found


def summary(rows: list[dict[str, dict[str, float]]]) -> dict:
    """For each rival and keep the mean recall, and on how many pictures the selector `saliency` is better."""
    figures: dict = {}
    for name in RIVALS:
        figures[name] = {}
        for keep in map(str, KEEPS):
            values = [row[name][keep] for row in rows]
            ours = [row["saliency"][keep] for row in rows]
            figures[name][keep] = {"recall": round(float(np.mean(values)), 3), "lowest": round(min(values), 3)}
            if name != "saliency":
                better = sum(a > b + 1e-9 for a, b in zip(ours, values, strict=True))
                figures[name][keep]["saliency_is_better"] = f"{better} of {len(rows)}"
    return figures


def photographs(assets) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """(subject, picture, boxes filled with 1) of `saliency_boxes.json`."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("runs/saliency.py: five photographs come with scikit-image: pip install scikit-image")
    shown = []
    for row in json.loads((ROOT / "runs" / "saliency_boxes.json").read_text(encoding="utf-8")):
        if row["source"] == "photos":
            image = assets.photos[row["key"]]
        else:
            file = Path(spec.submodule_search_locations[0]) / "data" / row["key"]
            image = np.asarray(Image.open(file).convert("RGB"))
        height, width = image.shape[:2]
        truth = np.zeros((height, width), np.float32)
        for left, top, right, bottom in row["boxes"]:
            truth[round(top * height) : round(bottom * height), round(left * width) : round(right * width)] = 1
        shown.append((row["subject"], image, truth))
    return shown


def overlap(likely: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Intersection over union of both halves at one half, and the mean absolute error."""
    a, b = likely > 0.5, truth > 0.5
    return {"iou": float((a & b).sum() / max(1, (a | b).sum())), "mae": float(np.abs(likely - truth).mean())}


def tile(image: np.ndarray, truth: np.ndarray, likely: np.ndarray, side: int = 96) -> np.ndarray:
    """The picture with its truth outlined, the map, and what is kept at 0.2."""
    grid = token_grid(*truth.shape)
    kept = select_tokens([image], [grid], SparseContextConfig(keep=0.2, selector="saliency")).references[0].mask
    lit = cv2.resize(kept.astype(np.uint8), image.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    shown = np.where(lit[..., None] > 0, image, image // 5)
    outline = image.copy()
    contours, _ = cv2.findContours((truth > 0.5).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(outline, contours, -1, (255, 40, 200), max(1, image.shape[1] // 96))
    grey = np.repeat((likely * 255).astype(np.uint8)[..., None], 3, -1)
    return np.hstack([cv2.resize(part, (side, side), interpolation=cv2.INTER_AREA) for part in (outline, grey, shown)])


class Drawn(list):
    """Photographs that note which of them was taken last."""

    last: int | None = None

    def __getitem__(self, i):
        self.last = int(i)
        return super().__getitem__(i)


def kept_whole(assets: Assets, split: str) -> dict[str, dict]:
    """How many objects of the embedded model's references `subject` keeps whole, by what is behind them: a texture, a
    photograph of a place (one of `BACKDROPS`), or one that shows a thing of its own."""
    of_split = assets.split(split)
    numbers = np.flatnonzero(assets.photo_split == SPLITS.index(split))
    photos, behind = Drawn(of_split.photos), []
    background = scenes.background

    def noted(*arguments, **more):
        photos.last = None
        drawn = background(*arguments, **more)
        behind.append(BEHIND[0 if photos.last is None else 1 if numbers[photos.last] in BACKDROPS else 2])
        return drawn

    shares: dict[str, dict[str, list[float]]] = {name: {str(keep): [] for keep in KEEPS[:2]} for name in BEHIND}
    samples, made = scene_samples(of_split, SCENES, FIRST_SEED[split])
    for sample in tqdm(samples, desc=f"{split} scenes"):
        if sample.task != "subjects":
            continue
        _, kind, seed = made[sample.name]
        behind.clear()
        scenes.background = noted
        try:
            scene = make_scene(replace(of_split, photos=photos), kind, seed)
        finally:
            scenes.background = background
        for reference, mask, name in zip(scene.references, scene.reference_masks, behind, strict=True):
            if mask.min() == 1:  # a picture to stand behind the object
                continue
            grid = reference.shape[0] // scenes.TOKEN, reference.shape[1] // scenes.TOKEN
            covered = cv2.resize(mask, grid[::-1], interpolation=cv2.INTER_AREA).ravel()
            for keep, found in shares[name].items():
                config = SparseContextConfig(keep=float(keep), selector="subject")
                index = select_tokens([reference], [grid], config).index
                found.append(float(covered[index].sum() / covered.sum()))
    figures: dict[str, dict] = {}
    for name, found in shares.items():
        figures[name] = {"objects": len(found[str(KEEPS[0])])}
        for keep, values in found.items():
            whole = np.mean(np.array(values) >= WHOLE)
            figures[name][keep] = {"whole": round(float(whole), 3), "kept": round(float(np.mean(values)), 3)}
    return figures


def times() -> dict:
    """CPU milliseconds for a 1-megapixel reference on one thread, and the ratio to `edges`, taking turns."""
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    image = picture()
    figures: dict[str, list[float]] = {"edges": [], "contrast": [], "saliency": []}
    for _ in range(WARM_UP + RUNS):
        for name, values in figures.items():
            start = time.process_time()  # other work on the machine does not count
            select_tokens([image], [GRID], SparseContextConfig(selector=name))
            values.append(1000 * (time.process_time() - start))
    ratios = np.array(figures["saliency"][WARM_UP:]) / np.array(figures["edges"][WARM_UP:])
    low, middle, high = np.percentile(ratios, [10, 50, 90])
    milliseconds = {
        name: {"median": round(float(np.median(v[WARM_UP:])), 2), "min": round(min(v[WARM_UP:]), 2)}
        for name, v in figures.items()
    }
    ratio = {"median": round(float(middle), 2), "p10": round(float(low), 2), "p90": round(float(high), 2)}
    return {"milliseconds": milliseconds, "ratio_to_edges": ratio}


SETS = {
    "held_out_composites": "composites of a held-out source",
    "photographs_not_chosen_on": "photographs with boxes, not chosen on",
    "photographs_chosen_on": "photographs with boxes, chosen on",
}
"""The sets of pictures whose recall is known, as the table names them."""


def recall() -> str:
    """How much of the subject's tokens the selector finds at keep 0.2, beside simpler ways."""
    ways = ("saliency", "net", "contrast", "centre", "edges", "uniform")
    rows = []
    for name, label in SETS.items():
        figures = read("saliency")["figures"][name]
        found = figures["recall"]
        cells = [f"{found[way]['0.2']['recall']:.2f}" if way in found else "" for way in ways]
        rows.append([label, str(figures["pictures"]), *cells])
    return table(["pictures", "number", *ways], rows)


def behind() -> str:
    """How many objects are kept whole, by what is behind them in the reference."""
    splits = read("saliency")["figures"]["objects_kept_whole"]
    rows = [
        [split, keep, *(f"{kind[keep]['whole']:.0%} of {kind['objects']}" for kind in kinds.values())]
        for split, kinds in splits.items()
        for keep in ("0.2", "0.1")
    ]
    return table(["split", "keep", *next(iter(splits.values()))], rows)


TABLES = {
    "saliency": recall,
    "saliency-behind": behind,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Judge the saliency net on what it was not trained on.")
    parser.add_argument("--folder", type=Path, default=ROOT / "checkpoints")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "saliency.json")
    parser.add_argument("--sheet", type=Path, default=ROOT / "checkpoints" / "saliency.webp")
    parser.add_argument("--table", action="store_true", help="only draw the tables of results/ again, from the JSON")
    arguments = parser.parse_args()
    checkout()  # of the code that runs, whatever is committed meanwhile
    if arguments.table:
        return draw(TABLES)

    assets = load_assets(arguments.folder / "assets.safetensors")
    sources = held_out_sources(assets)
    rows, overlaps, flat, tiles = [], {"net": [], "contrast": []}, [], []
    for seed in tqdm(range(COMPOSITES), desc="composites"):
        image, mask = composite(sources, np.random.default_rng([5, seed]), (SIZE, SIZE))
        likely = saliency_map(image)
        if mask.max() < 0.5:
            flat.append(float(likely.mean()))
            continue
        rows.append({name: recalls(image, mask, selector) for name, selector in RIVALS.items()})
        overlaps["net"].append(overlap(net_map(image), mask))
        overlaps["contrast"].append(overlap(SELECTORS["contrast"](image, mask.shape, np.random.default_rng()), mask))
        if len(tiles) < 12:
            tiles.append(tile(image, mask, likely))
    real, subjects = [], []
    for subject, image, truth in tqdm(photographs(assets), desc="photographs"):
        real.append({name: recalls(image, truth, selector) for name, selector in RIVALS.items()})
        subjects.append(
            {
                "subject": subject,
                "share": round(float(truth.mean()), 3),
                "recall_at_fifth": {name: round(real[-1][name]["0.2"], 3) for name in RIVALS},
            }
        )
        if len(real) % 2 and len(tiles) < 36:
            tiles.append(tile(image, truth, saliency_map(image)))
    means = {
        name: {key: round(float(np.mean([one[key] for one in each])), 3) for key in ("iou", "mae")}
        for name, each in overlaps.items()
    }
    figures = {
        "held_out_composites": {
            "pictures": len(rows),
            "recall": summary(rows),
            "overlap": means,
            "mean_score_without_subject": {"pictures": len(flat), "mean": round(float(np.mean(flat)), 4)},
        },
        "photographs_not_chosen_on": {"pictures": len(real[1::2]), "recall": summary(real[1::2])},
        "photographs_chosen_on": {"pictures": len(real[::2]), "recall": summary(real[::2])},
        "each_photograph": subjects,
        "objects_kept_whole": {split: kept_whole(assets, split) for split in SPLITS[1:]},
        "time": times(),
        "size": {"parameters": sum(p.numel() for p in load_net().parameters()), "bytes": WEIGHTS.stat().st_size},
    }
    settings = {"keep": list(KEEPS), "composites": COMPOSITES, "composite_size": SIZE, "token": TOKEN, "runs": RUNS}
    write_result(arguments.output, "saliency", settings, figures)
    draw(TABLES)
    columns = 4
    sheet = np.hstack([np.vstack(tiles[i::columns][: len(tiles) // columns]) for i in range(columns)])
    save_picture(Image.fromarray(sheet), arguments.sheet)
    for part in list(figures)[:3]:
        print(part)
        for name, by_keep in figures[part]["recall"].items():
            print(f"  {name:10}" + "".join(f"{keep:>6}: {by_keep[keep]['recall']:.3f}" for keep in by_keep))
    print(json.dumps({"overlap": means, **figures["time"], **figures["size"]}, indent=2))


if __name__ == "__main__":
    main()
