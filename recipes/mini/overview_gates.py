"""How well a run of overviews does so far: pictures of validation scenes, by the tokens that they were made from.

    python -m recipes.mini overview-gate --folder checkpoints --name overview
    python -m recipes.mini overview-gate --folder checkpoints               # the weights that ship

A call of the pipeline, without the pipeline: its noise levels, and the transformer on the tokens of a set. Sharp tokens
are chosen where the overview is wrong, and of subjects, whose objects are all that counts, by their true masks, too.
"""

import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from sparse_context.overview import overview_grid, residual
from sparse_context.pipelines.embedded import OVERVIEW
from sparse_context.pipelines.load import load
from sparse_context.pipelines.lora_file import NO_LORA
from sparse_context.pipelines.overview_blocks import grown, load_blocks
from sparse_context.pipelines.spec import ModelSpec
from sparse_context.training.checkpoints import load_average

from .data import load_assets
from .loss import encode_text, position_ids, text_ids, tokenise
from .model import decode_pictures, encode_pictures
from .overview_sets import TokenSet, composites, grids_of, reference_tokens
from .run_folder import autocast, to_tensor
from .scenes import SIZE, TOKEN, Scene, make_scene

STEPS = 8
BATCH = 8  # scenes
TASKS = ("edit_background", "edit_object", "edit_global", "subject_place", "subject_pair")
SHIPPED = "shipped"  # the folder of the gates of the package's weights


class Gate(NamedTuple):
    """Which tokens a picture is made from. who: "base", "dropper" (the base with its LoRA), "student", or "ceiling":
    the base with all tokens of the picture that the set holds. factor: of the overview, 0 without one. keep: the budget
    as a share of all tokens, overview included; 0 is the overview alone. rule: what sharp tokens are chosen by."""

    who: str
    factor: int = 0
    keep: float = 0.0
    rule: str = "residual"

    def __str__(self) -> str:
        if not self.factor:
            return self.who if self.keep == 1 else f"{self.who} {self.keep:g}"
        return f"{self.who} by {self.factor}" + (f", {self.keep:g} {self.rule}" if self.keep else "")


GATES = (
    Gate("base", keep=1),
    Gate("dropper", keep=0.2),
    Gate("dropper", keep=0.1),
    Gate("student", keep=1),
    Gate("student", keep=0.2),
    Gate("student", 4),
    Gate("student", 4, 0.1),
    Gate("student", 4, 0.2),
    Gate("student", 4, 0.3),
    Gate("student", 2),
    Gate("student", 2, 0.3),
)


def tokens_of(gate: Gate, scene: Scene) -> TokenSet:
    """The tokens that a gate keeps, of each reference the same share: sharp ones where the overview is wrong."""
    parts, start = [], 0
    for picture, mask in zip(scene.references, scene.reference_masks, strict=True):
        grid = picture.shape[0] // TOKEN, picture.shape[1] // TOKEN
        count = grid[0] * grid[1]
        rows, columns = overview_grid(grid, gate.factor) if gate.factor else (0, 0)
        scores = residual(picture, grid, gate.factor or 4)
        if gate.rule == "mask":
            scores = scores * (0.1 + mask.reshape(grid[0], TOKEN, grid[1], TOKEN).mean((1, 3)))
        sharp = max(0, round(gate.keep * count) - rows * columns)
        parts.append(start + np.sort(np.argsort(-scores.ravel(), kind="stable")[:sharp]))
        start += count
    kept = np.concatenate(parts).astype(np.int64)
    kind = "dense" if gate.keep == 1 else "sharp" if len(kept) else "alone"
    return TokenSet(kind, gate.factor, kept)


@torch.no_grad()
def make_pictures(pipe: Any, transformers: dict[str, Any], gate: Gate, scenes: Sequence[Scene]) -> np.ndarray:
    """One uint8 picture for each scene, (B, H, W, 3)."""
    vae, grid = pipe.vae, (SIZE // TOKEN, SIZE // TOKEN)
    noise = torch.stack(
        [torch.randn(grid[0] * grid[1], 32, generator=torch.Generator().manual_seed(i)) for i in range(len(scenes))]
    )
    ids, attends = tokenise(pipe.tokenizer, [scene.prompt for scene in scenes])
    with autocast("cpu"):
        text = encode_text(pipe.text_encoder, ids, attends)
        parts, places = [], []
        for scene in scenes:  # each with tokens of its own
            tokens = tokens_of(gate, scene)
            shown = [to_tensor([each]).contiguous(memory_format=torch.channels_last) for each in scene.references]
            latents = [encode_pictures(vae, picture).float() for picture in shown]
            if gate.who == "ceiling":
                held = composites(vae, shown, grids_of(latents), tokens)
                latents = [encode_pictures(vae, picture).float() for picture in held]
                tokens = TokenSet("dense", 0, np.arange(sum(part[0, 0].numel() for part in latents)))
            part, where = reference_tokens(vae, shown, latents, tokens)
            parts.append(part)
            places.append(where)
        transformer = transformers["base" if gate.who == "ceiling" else gate.who]
        output_ids = position_ids(*grid, 0).float()
        alike = all(torch.equal(where, places[0]) for where in places)  # a batch has its ids in common
        size = BATCH if alike else 1
        batches = [slice(i, i + size) for i in range(0, len(scenes), size)]
        sigmas = torch.linspace(1, 1 / STEPS, STEPS)
        sigmas = torch.cat([2 * sigmas / (1 + sigmas), torch.zeros(1)])  # shifted by the scheduler's 2
        for rows in batches:
            part, ids = torch.cat(parts[rows]), torch.cat([output_ids, places[rows][0]])
            for now, then in itertools.pairwise(sigmas):
                velocity = transformer(
                    hidden_states=torch.cat([noise[rows], part], 1),
                    encoder_hidden_states=text[rows],
                    timestep=now.expand(len(part)),
                    img_ids=ids,
                    txt_ids=text_ids(text.shape[1]).float(),
                    return_dict=False,
                )[0][:, : noise.shape[1]]
                noise[rows] += (then - now) * velocity.float()
        pixels = decode_pictures(vae, noise.transpose(1, 2).unflatten(2, grid)).float()
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def psnr(picture: np.ndarray, scene: Scene) -> float:
    """In dB, in the mask of the objects; of a global edit in the whole picture."""
    error = np.square(picture.astype(np.float64) - scene.target).mean(-1)
    weights = np.ones_like(error) if scene.focus.max() == 0 else scene.mask
    return float(-10 * np.log10((error * weights).sum() / weights.sum() / 255**2))


def fingerprint_of(file: Path) -> str:
    """Tells the weights that ship from those that shipped before."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12]


def run_gate(
    folder: Path, name: str | None, scenes: int = 8, gates: Sequence[Gate] = GATES, tasks: Sequence[str] = TASKS
) -> dict[str, dict[str, float]]:
    """Mean PSNR by gate and task of the run's newest average, or without a name of the weights that ship. It is added
    to `gates.jsonl` in the run's folder."""
    assets = load_assets(folder / "assets.safetensors").split("validation")
    pipe = load(ModelSpec(dtype="float32", device="cpu", lora=NO_LORA))
    dropper = load(ModelSpec(dtype="float32", device="cpu")).transformer
    student = grown(dropper)
    step = 0
    if name is None:
        load_blocks(student, OVERVIEW)
        (folder / SHIPPED).mkdir(exist_ok=True)
    else:
        step = load_average(folder / name, student)
    transformers = {"base": pipe.transformer, "dropper": dropper, "student": student}
    for part in (pipe.vae, pipe.text_encoder, *transformers.values()):
        part.eval().requires_grad_(False)
    made = {task: [make_scene(assets, task, seed) for seed in range(scenes)] for task in tasks}
    figures: dict[str, dict[str, float]] = {}
    bar = tqdm([(gate, task) for gate in gates for task in tasks], desc="gates", unit="group")
    for gate, task in bar:
        if task.startswith("subject_"):
            gate = gate._replace(rule="mask")
        pictures = make_pictures(pipe, transformers, gate, made[task])
        found = [psnr(picture, scene) for picture, scene in zip(pictures, made[task], strict=True)]
        figures.setdefault(str(gate), {})[task] = round(float(np.mean(found)), 3)
    with (folder / (name or SHIPPED) / "gates.jsonl").open("a", encoding="utf-8") as file:
        weights = {"weights": fingerprint_of(OVERVIEW)} if name is None else {}
        file.write(json.dumps({"step": step, "scenes": scenes, **weights, "psnr": figures}) + "\n")
    return figures
