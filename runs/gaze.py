"""Whether the model's own attention, in the first step, points at what the prompt is about.

    python runs/gaze.py [--scenes 48] [--assets checkpoints/assets.safetensors] [--output results/gaze.json]

Each head of the single blocks gives a score to each reference token: the attention that output tokens pay it in the
first step, when they are noise. Read twice: with all tokens, by the embedded base, and from an overview by 4 alone, by
what was trained to read one so far (the embedded model's weights for overviews). One head is chosen on validation
scenes, that of which the worst area of all tasks is best, and measured on the test split: by itself and times saliency,
beside selectors that look at the picture alone.

Per reference and in the mean over scenes: the area under the ROC curve of the object's tokens against all others, the
share of the best tenth of the tokens that show the object, and where a reference holds a second object that the prompt
does not name, the area against that one's tokens alone: a half is a toss-up. Then pictures are made from the tokens
that attention chooses (as if the first step had been free), beside those of the default rule and of the true masks:
those of edits by the weights for overviews, with one by 4, and those of subjects without. What the first step takes to
look is measured apart, as a share of the call with the default rule.

It needs the scenes' objects: `python -m recipes.mini data`.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from tables import draw, machine, read, table
from torchmetrics.functional.classification import binary_auroc
from tqdm import tqdm

from recipes.mini.data import Assets, load_assets
from recipes.mini.loss import encode_text, position_ids, text_ids, tokenise
from recipes.mini.model import encode_pictures
from recipes.mini.overview_gates import psnr
from recipes.mini.overview_sets import TokenSet, reference_tokens
from recipes.mini.run_folder import to_tensor
from recipes.mini.samples import tasks_of
from recipes.mini.scenes import SHOWS, TOKEN, Scene, make_scene
from recipes.mini.teaching import attention_scores, watched_heads
from sparse_context import SparseContextConfig, mask
from sparse_context.evaluation.statistics import bootstrap_interval
from sparse_context.families.host import flat
from sparse_context.pipelines.engine import Engine
from sparse_context.pipelines.load import load
from sparse_context.pipelines.lora_file import NO_LORA, OVERVIEW_LORA
from sparse_context.pipelines.spec import ModelSpec, Request
from sparse_context.result import checkout, write_result
from sparse_context.selectors import SELECTORS
from sparse_context.selectors.registry import SelectorsLike

ROOT = Path(__file__).resolve().parents[1]
TASKS = ("subject_place", "subject_pair", "edit_background", "edit_object", "edit_named")
PICTURED = ("edit_named", "edit_background", "subject_place")
KEEPS = (0.2, 0.1)
SELECTED = ("saliency", "edges", "random")
FACTOR = 4
CHOSEN_OF = 0.1
WORDS = {
    "all": "attention, all tokens",
    "overview": "attention, overview alone",
    "saliency x all": "saliency x attention, all tokens",
    "saliency x overview": "saliency x attention, overview alone",
}
DRAWN = ("saliency", "saliency x all", "saliency x overview", "true mask")
"""Ways whose tokens make pictures, beside the default rule."""
LOOKS = ("saliency x all", "saliency x overview")
"""Ways that need a first step to look."""

Scores = Mapping[str, Sequence[np.ndarray]]
"""By what gave them, scores (rows, columns) of each reference's tokens."""

# Tables ---------------------------------------------------------------------------------------------------------------


def gaze() -> str:
    """How well each way points at the object, by task."""
    result = read("gaze")
    rows = []
    for task, ways in result["figures"]["test"].items():
        for way, found in ways.items():
            head = result["figures"]["heads"][way]
            other = f"{found['other']:.2f}" if "other" in found else ""
            rows.append([task, WORDS.get(way, way), head, f"{found['area']:.2f}", f"{found['tenth']:.2f}", other])
    head = ["task", "by", "block, head", "area", "best tenth on the object", "area against the other object"]
    return f"{table(head, rows)}\n\n{machine(result)}"


def gaze_pictures() -> str:
    """What pictures win over the default rule, in dB in the mask, with intervals of 95 %."""
    rows = []
    for task, keeps in read("gaze")["figures"]["pictures"].items():
        for keep, ways in keeps.items():
            dense = ways.get("all tokens")  # which a result of before has not
            cells = ["" if dense is None else f"{dense['psnr']:.1f}", f"{ways['default']['psnr']:.1f}"]
            for way in DRAWN:
                low, high = ways[way]["interval"]
                cells.append(f"{ways[way]['won']:+.1f} ({low:+.1f} to {high:+.1f})")
            looks = [ways[way].get("look") for way in LOOKS]  # a result of before has none
            cells += ["" if look is None else f"{100 * look:.0f} %" for look in looks]
            rows.append([task, keep, *cells])
    looks = ["look, all tokens", "look, overview alone"]
    return table(
        ["task", "keep", "all tokens, dB", "default rule, dB", *(WORDS.get(way, way) for way in DRAWN), *looks], rows
    )


TABLES = {"gaze": gaze, "gaze-pictures": gaze_pictures}

# The run --------------------------------------------------------------------------------------------------------------


class View(NamedTuple):
    """What a model looks at. references: tokens (1, N, C), with their ids. grids: of each reference."""

    transformer: Any
    text: torch.Tensor
    references: torch.Tensor
    ids: torch.Tensor
    grids: Sequence[tuple[int, int]]


class Eyes:
    """Reads attention in the first step of both models."""

    def __init__(self) -> None:
        pipe = load(ModelSpec(dtype="float32", device="cpu", lora=NO_LORA))
        self.vae, self.text_encoder, self.tokenizer, self.base = (
            pipe.vae,
            pipe.text_encoder,
            pipe.tokenizer,
            pipe.transformer,
        )
        self.student = load(ModelSpec(dtype="float32", device="cpu", lora=OVERVIEW_LORA)).transformer

    @torch.no_grad()
    def __call__(self, scene: Scene, seed: int) -> dict[str, dict[str, list[np.ndarray]]]:
        """By "all" and "overview", by the head as "block, head", the scores of each reference."""
        found = {way: self._look(*view, seed) for way, view in self._views(scene).items()}
        enlarge = np.ones((FACTOR, FACTOR))
        found["overview"] = {head: [np.kron(part, enlarge) for part in of] for head, of in found["overview"].items()}
        return found

    @torch.no_grad()
    def seconds(self, scene: Scene, seed: int, heads: Mapping[str, str]) -> dict[str, float]:
        """What a first step takes that reads one head, by way. What it takes to encode is a part of the call anyway."""
        taken = {}
        for way, view in self._views(scene).items():
            start = time.perf_counter()
            self._look(*view, seed, heads[way])
            taken[way] = time.perf_counter() - start
        return taken

    def _views(self, scene: Scene) -> dict[str, View]:
        pictures = [to_tensor([picture]) for picture in scene.references]
        text = encode_text(self.text_encoder, *tokenise(self.tokenizer, [scene.prompt]))
        latents = [encode_pictures(self.vae, picture).float() for picture in pictures]
        grids = [(part.shape[-2], part.shape[-1]) for part in latents]
        whole = torch.cat([flat(part) for part in latents], 1)
        ids = torch.cat([position_ids(*grid, 10 * (i + 1)).float() for i, grid in enumerate(grids)])
        alone = TokenSet("alone", FACTOR, np.zeros(0, np.int64))
        coarse = [(rows // FACTOR, columns // FACTOR) for rows, columns in grids]
        tokens = reference_tokens(self.vae, pictures, latents, alone)
        return {
            "all": View(self.base, text, whole, ids, grids),
            "overview": View(self.student, text, *tokens, coarse),
        }

    def _look(
        self,
        transformer: Any,
        text: torch.Tensor,
        references: torch.Tensor,
        ids: torch.Tensor,
        grids: Sequence[tuple[int, int]],
        seed: int,
        only: str | None = None,
    ) -> dict[str, list[np.ndarray]]:
        config = transformer.config
        heads = [(b, h) for b in range(config.num_single_layers) for h in range(config.num_attention_heads)]
        heads = [each for each in heads if only in (None, f"{each[0]}, {each[1]}")]
        noise = torch.randn(1, 256, references.shape[-1], generator=torch.Generator().manual_seed(seed))
        ids = torch.cat([position_ids(16, 16, 0).float(), ids])
        texts = text_ids(text.shape[1]).float()
        with watched_heads(transformer, heads) as pairs:
            transformer(
                hidden_states=torch.cat([noise, references], 1),
                encoder_hidden_states=text,
                timestep=torch.ones(1),
                img_ids=ids,
                txt_ids=texts,
                return_dict=False,
            )
        rotary = transformer.pos_embed(torch.cat([texts, ids]))
        first = text.shape[1]
        looks = {}
        for (block, head), pair in zip(heads, pairs, strict=True):
            attention = attention_scores(*pair, rotary, slice(first, first + 256)).softmax(-1)[0].sum(0)
            parts = attention[first + 256 :].split([rows * columns for rows, columns in grids])
            looks[f"{block}, {head}"] = [
                part.numpy().reshape(grid).astype(np.float64) for part, grid in zip(parts, grids, strict=True)
            ]
        return looks


def selected(scene: Scene, seed: int) -> dict[str, list[np.ndarray]]:
    """Scores by selectors, which know nothing of the prompt."""
    found: dict[str, list[np.ndarray]] = {}
    for name in SELECTED:
        for picture in scene.references:
            grid = picture.shape[0] // TOKEN, picture.shape[1] // TOKEN
            scores = SELECTORS[name](picture, grid, np.random.default_rng(seed))
            found.setdefault(name, []).append(np.asarray(scores, np.float64).reshape(grid))
    return found


def products(
    looks: Mapping[str, Mapping[str, Sequence[np.ndarray]]], salient: Sequence[np.ndarray]
) -> dict[str, dict[str, list[np.ndarray]]]:
    """Each look times saliency: what is a thing at all is left to that, and which of the things to attention."""
    return {
        f"saliency x {way}": {
            head: [one * other for one, other in zip(scores, salient, strict=True)] for head, scores in heads.items()
        }
        for way, heads in looks.items()
    }


def in_tokens(mask: np.ndarray) -> np.ndarray:
    """A mask's share of each token."""
    rows, columns = (side // TOKEN for side in mask.shape)
    return mask.reshape(rows, TOKEN, columns, TOKEN).mean((1, 3))


def judge(scores: Sequence[np.ndarray], scene: Scene) -> dict[str, float]:
    """The figures of one scene: means over its references. A token shows an object from half of it on."""
    areas, tenths, others = [], [], []
    for i, (given, shown) in enumerate(zip(scores, scene.reference_masks, strict=True)):
        covered = in_tokens(shown)
        if not 0 < (covered >= 0.5).sum() < covered.size:
            continue  # a background, all of which counts
        areas.append(area(given, covered >= 0.5, covered < SHOWS))
        best = np.argsort(-given.ravel(), kind="stable")[: round(CHOSEN_OF * given.size)]
        tenths.append(float((covered.ravel()[best] >= SHOWS).mean()))
        if scene.distractors and (in_tokens(scene.distractors[i]) >= 0.5).any():
            others.append(area(given, covered >= 0.5, in_tokens(scene.distractors[i]) >= 0.5))
    named = {"area": areas, "tenth": tenths, "other": others}
    return {name: float(np.mean(values)) for name, values in named.items() if values}


def area(scores: np.ndarray, object_: np.ndarray, rest: np.ndarray) -> float:
    """Under the ROC curve of telling the two kinds of tokens apart. Scores count by their rank."""
    known = object_ | rest
    ranks = np.unique(scores[known], return_inverse=True)[1] / known.sum()
    return float(binary_auroc(torch.from_numpy(ranks), torch.from_numpy(object_[known].astype(np.int64))))


def measure(eyes: Eyes, assets: Assets, task: str, scenes: int) -> dict[str, dict[str, dict[str, float]]]:
    """By way, by head or "" for a selector, the mean figures over scenes of one split."""
    every: dict[str, dict[str, list[dict[str, float]]]] = {}
    for seed in tqdm(range(scenes), desc=task, unit="scene"):
        scene = make_scene(assets, task, seed)
        ways: dict[str, Mapping[str, Sequence[np.ndarray]]] = dict(eyes(scene, seed))
        pictured = selected(scene, seed)
        ways |= products(ways, pictured["saliency"])
        ways |= {name: {"": scores} for name, scores in pictured.items()}
        for way, heads in ways.items():
            for head, scores in heads.items():
                every.setdefault(way, {}).setdefault(head, []).append(judge(scores, scene))
    return {way: {head: means(found) for head, found in heads.items()} for way, heads in every.items()}


# Pictures -------------------------------------------------------------------------------------------------------------


class Pen:
    """Makes pictures from tokens that a selector chose: of edits beside an overview."""

    def __init__(self) -> None:
        self.engine = Engine(ModelSpec(device="cpu"), bar=False)

    def __call__(self, scene: Scene, seed: int, keep: float, selector: SelectorsLike) -> tuple[float, float]:
        """PSNR against the truth in the mask of the objects, in dB, and seconds. selector: None is the tasks' own."""
        tasks = tasks_of(scene)
        overview = None if "subject" in tasks else FACTOR
        config = SparseContextConfig(keep=keep, task=tasks, selector=selector, overview=overview)
        references = [Image.fromarray(picture) for picture in scene.references]
        made = self.engine(Request(scene.prompt, references, config, seed))
        return psnr(np.asarray(made.image), scene), made.times.total


def by_scores(scores: Sequence[np.ndarray]) -> SelectorsLike:
    """Selectors that give each reference these scores, of which the highest becomes 1."""
    top = max(float(each.max()) for each in scores) or 1.0
    return [lambda image, grid, generator, each=each: (each / top).astype(np.float32) for each in scores]


def make_pictures(eyes: Eyes, assets: Assets, heads: Mapping[str, str], scenes: int) -> dict[str, Any]:
    """By task and keep, the mean PSNR of each way and its difference to the default rule with an interval."""
    pen, found = Pen(), {}
    seen = {way: heads[f"saliency x {way}"] for way in ("all", "overview")}
    for task in PICTURED:
        levels: dict[str, dict[str, list[float]]] = {f"{keep:g}": {} for keep in KEEPS}
        taken: dict[str, dict[str, list[float]]] = {f"{keep:g}": {} for keep in KEEPS}
        for seed in tqdm(range(scenes), desc=f"pictures, {task}", unit="scene"):
            scene = make_scene(assets, task, seed)
            looks = products(eyes(scene, seed), selected(scene, seed)["saliency"])
            seconds = eyes.seconds(scene, seed, seen)
            ways: dict[str, SelectorsLike] = {way: by_scores(look[heads[way]]) for way, look in looks.items()}
            ways |= {"default": None, "saliency": "saliency", "true mask": mask([*scene.reference_masks])}
            dense, _ = pen(scene, seed, 1.0, None)
            for keep in (f"{keep:g}" for keep in KEEPS):
                levels[keep].setdefault("all tokens", []).append(dense)
                for way, selector in ways.items():
                    level, call = pen(scene, seed, float(keep), selector)
                    levels[keep].setdefault(way, []).append(level)
                    if way == "default":
                        for view, look in seconds.items():
                            taken[keep].setdefault(f"saliency x {view}", []).append(look / call)
        found[task] = {
            keep: {way: against(each, of["default"]) for way, each in of.items()} for keep, of in levels.items()
        }
        for keep, of in taken.items():
            for way, shares in of.items():
                found[task][keep][way]["look"] = round(float(np.median(shares)), 4)
    return found


def against(levels: Sequence[float], default: Sequence[float]) -> dict[str, Any]:
    """Mean, and the mean paired difference to the default rule with its interval of 95 %."""
    won = np.subtract(levels, default)
    interval = [round(end, 3) for end in bootstrap_interval([*won])]
    return {"psnr": round(float(np.mean(levels)), 3), "won": round(float(won.mean()), 3), "interval": interval}


def means(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of each figure, over the scenes that have it: an object may cover no token by half."""
    names = {name: None for each in found for name in each}
    return {name: round(float(np.mean([each[name] for each in found if name in each])), 4) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description="Where attention looks in the first step.")
    parser.add_argument("--scenes", type=int, default=48, help="of each task and split")
    parser.add_argument("--pictured", type=int, default=24, help="scenes of each task of which pictures are made")
    parser.add_argument("--assets", type=Path, default=ROOT / "checkpoints" / "assets.safetensors")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "gaze.json")
    parser.add_argument("--table", action="store_true", help="only draw the tables of results/ again, from the JSON")
    arguments = parser.parse_args()
    checkout()  # of the code that runs, whatever is committed meanwhile
    if arguments.table:
        return draw(TABLES)

    assets, eyes = load_assets(arguments.assets), Eyes()
    seen = {task: measure(eyes, assets.split("validation"), task, arguments.scenes) for task in TASKS}
    found = {task: measure(eyes, assets.split("test"), task, arguments.scenes) for task in TASKS}
    chosen = {}
    for way, heads in seen[TASKS[0]].items():
        worst = {
            head: min(seen[task][way][head].get(name, 1.0) for task in TASKS for name in ("area", "other"))
            for head in heads
        }
        chosen[way] = max(worst, key=worst.__getitem__)
    test = {task: {way: found[task][way][head] for way, head in chosen.items()} for task in TASKS}
    every = {task: {way: heads for way, heads in of.items() if len(heads) > 1} for task, of in seen.items()}
    pictures = make_pictures(eyes, assets.split("test"), chosen, arguments.pictured)
    config = {"scenes": arguments.scenes, "pictured": arguments.pictured, "factor": FACTOR, "tasks": TASKS}
    figures = {"heads": chosen, "test": test, "pictures": pictures, "validation": every}
    write_result(arguments.output, "gaze", config, figures)
    draw(TABLES)
    print(gaze(), gaze_pictures(), sep="\n\n")


if __name__ == "__main__":
    main()
