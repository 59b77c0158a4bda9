"""How well a run of overviews does so far: pictures of validation scenes, by the tokens that they were made from.

    python -m recipes.mini overview-gate --folder checkpoints --name overview

A call of the pipeline, without the pipeline: its noise levels, and the transformer on the tokens of a set.
"""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from sparse_context.families.host import flat
from sparse_context.overview import residual
from sparse_context.pipelines.load import load
from sparse_context.pipelines.lora_file import NO_LORA
from sparse_context.pipelines.overview_blocks import grown
from sparse_context.pipelines.spec import ModelSpec
from sparse_context.training.checkpoints import load_average

from .data import load_assets
from .loss import encode_text, position_ids, text_ids, tokenise
from .model import decode_pictures, encode_pictures
from .overview_sets import TokenSet, composite, reference_tokens
from .run_folder import autocast, to_tensor
from .scenes import TOKEN, Scene, make_scene

STEPS = 8
TASKS = ("edit_background", "edit_object", "edit_global")


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
    Gate("student", 4),
    Gate("student", 4, 0.1),
    Gate("student", 4, 0.2),
    Gate("student", 4, 0.3),
    Gate("student", 2),
    Gate("student", 2, 0.3),
)


def tokens_of(gate: Gate, scene: Scene) -> TokenSet:
    """The tokens of one reference that a gate keeps: sharp ones where the overview is wrong and the edit looks."""
    picture, mask = scene.references[0], scene.reference_masks[0]
    grid = picture.shape[0] // TOKEN, picture.shape[1] // TOKEN
    count = grid[0] * grid[1]
    if gate.keep == 1:
        return TokenSet("dense", 0, np.arange(count))
    spent = -(-grid[0] // gate.factor) * -(-grid[1] // gate.factor) if gate.factor else 0
    scores = residual(picture, grid, gate.factor or 4)
    if gate.rule == "mask":
        scores = scores * (0.1 + mask.reshape(grid[0], TOKEN, grid[1], TOKEN).mean((1, 3)))
    sharp = max(0, round(gate.keep * count) - spent)
    kept = np.sort(np.argsort(-scores.ravel(), kind="stable")[:sharp])
    return TokenSet("sharp" if sharp else "alone", gate.factor, kept.astype(np.int64))


@torch.no_grad()
def make_pictures(pipe: Any, transformers: dict[str, Any], gate: Gate, scenes: Sequence[Scene]) -> np.ndarray:
    """One uint8 picture for each scene, (B, H, W, 3); the scenes have one reference each and are of one task."""
    vae = pipe.vae
    noise = torch.stack(
        [torch.randn(16 * 16, 32, generator=torch.Generator().manual_seed(i)) for i in range(len(scenes))]
    )
    picture = to_tensor([scene.references[0] for scene in scenes]).contiguous(memory_format=torch.channels_last)
    ids, attends = tokenise(pipe.tokenizer, [scene.prompt for scene in scenes])
    with autocast("cpu"):
        text = encode_text(pipe.text_encoder, ids, attends)
        latents, parts, places = encode_pictures(vae, picture).float(), [], []
        for i, scene in enumerate(scenes):  # each with tokens of its own
            tokens = tokens_of(gate, scene)
            if gate.who == "ceiling":
                seen = composite(vae, picture[i : i + 1], latents.shape[-2:], gate.factor, tokens.kept)
                part = flat(encode_pictures(vae, seen).float())
                where = position_ids(*latents.shape[-2:], 10).float()
            else:
                part, where = reference_tokens(vae, [picture[i : i + 1]], [latents[i : i + 1]], tokens)
            parts.append(part)
            places.append(where)
        transformer = transformers["base" if gate.who == "ceiling" else gate.who]
        output_ids = position_ids(*latents.shape[-2:], 0).float()
        alike = all(torch.equal(where, places[0]) for where in places)  # a batch has its ids in common
        batches = [slice(None)] if alike else [slice(i, i + 1) for i in range(len(scenes))]
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
        pixels = decode_pictures(vae, noise.transpose(1, 2).unflatten(2, latents.shape[-2:])).float()
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def psnr(picture: np.ndarray, scene: Scene) -> float:
    """In dB, in the mask of the objects; of a global edit in the whole picture."""
    error = np.square(picture.astype(np.float64) - scene.target).mean(-1)
    weights = np.ones_like(error) if scene.focus.max() == 0 else scene.mask
    return float(-10 * np.log10((error * weights).sum() / weights.sum() / 255**2))


def run_gate(
    folder: Path, name: str, scenes: int = 8, gates: Sequence[Gate] = GATES, tasks: Sequence[str] = TASKS
) -> dict[str, dict[str, float]]:
    """Mean PSNR by gate and task of the run's newest average, which is added to `gates.jsonl` in its folder."""
    assets = load_assets(folder / "assets.safetensors").split("validation")
    pipe = load(ModelSpec(dtype="float32", device="cpu", lora=NO_LORA))
    dropper = load(ModelSpec(dtype="float32", device="cpu")).transformer
    student = grown(dropper)
    step = load_average(folder / name, student)
    transformers = {"base": pipe.transformer, "dropper": dropper, "student": student}
    for part in (pipe.vae, pipe.text_encoder, *transformers.values()):
        part.eval().requires_grad_(False)
    made = {task: [make_scene(assets, task, seed) for seed in range(scenes)] for task in tasks}
    figures: dict[str, dict[str, float]] = {}
    bar = tqdm([(gate, task) for gate in gates for task in tasks], desc="gates", unit="group")
    for gate, task in bar:
        pictures = make_pictures(pipe, transformers, gate, made[task])
        found = [psnr(picture, scene) for picture, scene in zip(pictures, made[task], strict=True)]
        figures.setdefault(str(gate), {})[task] = round(float(np.mean(found)), 3)
    with (folder / name / "gates.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "scenes": scenes, "psnr": figures}) + "\n")
    return figures
