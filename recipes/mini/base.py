"""The base: transformer and text encoder, on all reference tokens."""

import contextlib
import json
import shutil
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import Qwen2Tokenizer

from sparse_context.images import put_in_place, save_text
from sparse_context.pipelines.load import load
from sparse_context.pipelines.spec import ModelSpec
from sparse_context.training.attention import MatmulAttention
from sparse_context.training.cache import fingerprint
from sparse_context.training.checkpoints import newest_step, start_from
from sparse_context.training.compiled import compiled_blocks
from sparse_context.training.data import Ahead
from sparse_context.training.loop import LoopConfig, train
from sparse_context.training.optimisers import drawn_from, make_optimisers

from .data import Assets, load_assets
from .loss import encode_text, flow_matching_loss, tokenise
from .model import (
    TEXT_LAYERS,
    TEXT_LENGTH,
    encode_pictures,
    make_pipeline,
    make_text_encoder,
    make_tokenizer,
    make_transformer,
)
from .run_folder import autocast, check_config, default_device, save_config, save_whole, to_unit
from .scenes import EDITS, FAR, REFERENCE, SIZE, TASKS, TOKEN, Scene, draw_scene, make_scene
from .vae import load_vae

SIDES = (96, SIZE, REFERENCE, REFERENCE)  # of a subject's references, in pixels; one is drawn


IN_TURN = 4  # batches, of which one comes again when the others were taken


ALONE = (*EDITS, "subject_place", "subject_scale")  # the tasks with one reference


@dataclass(frozen=True)
class BaseConfig:
    """The dense base: `steps` batches of samples whose references have the same number and sizes.

    `mix` holds the share of each task; until `alone_until` of the run only the tasks with one reference are drawn, and
    until `small_until` the references of subjects have 128 pixels, afterwards one of `SIDES`: small ones leave room for
    more samples, from which it is learned sooner which reference is meant; large ones are what the model is for.
    Objects move by one token at most until the first of `reach`, then farther by the same factor each step, and as far
    as they like from the second: copying is learned in place first. A batch has `batch` samples where there is one
    reference of 128 pixels, more or fewer with other tokens, so that steps cost the same, but no fewer than four. Each
    batch is taken `repeats` times, with other noise, in turns of `IN_TURN`: to compose and to encode one may take as
    long as the step. An output token inside an object counts `1 + focus` times; `teach` is the weight of the
    `correspondence_loss`.
    """

    steps: int = 3800
    batch: int = 16
    repeats: int = 1
    lr: float = 1e-3
    muon_lr: float = 2e-3
    warmup: int = 100
    ema: float = 0.999
    alone_until: float = 0.3
    small_until: float = 0.15
    reach: tuple[float, float] = (0.0, 0.2)
    focus: float = 2.0
    teach: float = 0.1
    vocabulary: int = 512
    seed: int = 0
    mix: tuple[tuple[str, float], ...] = (
        ("edit_background", 0.08),
        ("edit_object", 0.08),
        ("edit_global", 0.07),
        ("edit_remove", 0.01),
        ("subject_place", 0.29),
        ("subject_scale", 0.01),
        ("subject_pair", 0.18),
        ("subject_scene", 0.12),
        ("subject_quarters", 0.16),
    )

    def __post_init__(self) -> None:
        if not self.repeats >= 1:
            raise ValueError(f"repeats is {self.repeats!r}: pass a whole number, 1 or more.")

    @property
    def without_easy_part(self) -> "BaseConfig":
        """For a model that has learned to copy already, with optimisers that begin anew."""
        return replace(self, alone_until=0.0, small_until=0.0, reach=(-1.0, 0.0), warmup=max(self.warmup, 200))


def batch_scenes(assets: Assets, config: BaseConfig, step: int) -> list[Scene]:
    """The scenes of one step: references of the same number and sizes, and where that is one, of different tasks."""
    rng = np.random.default_rng([config.seed, 2, step])
    names, shares = map(list, zip(*config.mix, strict=True))
    weights = np.array(shares)
    if step < config.alone_until * config.steps:
        weights[[name not in ALONE for name in names]] = 0
    begin, end = (share * config.steps for share in config.reach)
    reach = round(FAR ** np.interp(step, (begin, end), (0, 1)))
    side = int(rng.choice(SIDES)) if step >= config.small_until * config.steps else SIZE

    def draw() -> Scene:
        return draw_scene(assets, names[rng.choice(len(names), p=weights / weights.sum())], rng, side, reach)

    scenes = [draw()]
    shapes = [picture.shape for picture in scenes[0].references]
    alike = [name for name in ALONE if (name in EDITS) == scenes[0].task.startswith("edit_")]
    if len(shapes) > 1:
        alike = [scenes[0].task]
    elif side == SIZE:
        alike = [*ALONE]
    weights[[name not in alike for name in names]] = 0  # others would have other shapes
    tokens = [
        TEXT_LENGTH + sum(rows * columns for rows, columns, _ in pictures) // TOKEN**2
        for pictures in ([scenes[0].target.shape] * 2, [scenes[0].target.shape, *shapes])
    ]
    while len(scenes) < max(min(4, config.batch), round(config.batch * tokens[0] / tokens[1])):
        scene = draw()
        if [picture.shape for picture in scene.references] == shapes:
            scenes.append(scene)
    return scenes


class Batch(NamedTuple):
    """The scenes of a step as tensors. pictures: uint8 (B, S, S, 3), the targets and then each reference; ids, attends:
    of the prompts, int64 (B, 32); source: int64 (B, 256); focus: float32 (B, 256)."""

    pictures: list[torch.Tensor]
    ids: torch.Tensor
    attends: torch.Tensor
    source: torch.Tensor
    focus: torch.Tensor


def make_batch(assets: Assets, config: BaseConfig, tokenizer: Qwen2Tokenizer, step: int) -> Batch:
    """The `batch_scenes` of one step, ready for a device."""
    scenes = batch_scenes(assets, config, step)
    pictures = zip(*((scene.target, *scene.references) for scene in scenes), strict=True)
    return Batch(
        [torch.from_numpy(np.stack(same)) for same in pictures],
        *tokenise(tokenizer, [scene.prompt for scene in scenes]),
        torch.from_numpy(np.stack([scene.source for scene in scenes])).flatten(1),
        torch.from_numpy(np.stack([scene.focus for scene in scenes])).flatten(1),
    )


def batch_number(step: int, repeats: int) -> int:
    """Which batch a step takes: of `IN_TURN` that follow each other, one after the other, `repeats` times."""
    if repeats == 1:
        return step
    return step // (IN_TURN * repeats) * IN_TURN + step % IN_TURN


def prompt_corpus(assets: Assets) -> list[str]:
    """Prompts of every task, for the tokenizer."""
    return [make_scene(assets, task, seed).prompt for task in TASKS for seed in range(400)]


def train_base(
    folder: Path,
    config: BaseConfig = BaseConfig(),
    stop_after: float | None = None,
    workers: int = 0,
    seconds: float | None = None,
    save_every: int = 100,
    show_every: int = 500,
    compiled: bool = False,
) -> None:
    """Train transformer and text encoder together on all reference tokens; the VAE has to be there already.

    `workers` processes compose the scenes ahead of the steps; with 0 a thread does. `seconds` trains by the clock
    (`loop.train`). `compiled`: by `compiled_blocks`, which takes a minute or more first. What was restored goes
    on without the easy part, and with other scenes than before. Raises ValueError where a run of another config is in
    the folder.
    """
    before = steps_before(folder)
    if before:
        config = replace(config.without_easy_part, seed=config.seed + before)
    check_config(folder / "base", config)
    everything = load_assets(folder / "assets.safetensors")
    assets = everything.split("train")
    device = default_device()
    vae = load_vae(folder).to(device)
    if not (folder / "tokenizer").is_dir():  # its ids belong to the embeddings that are being trained
        save_whole(make_tokenizer(prompt_corpus(assets), config.vocabulary), folder / "tokenizer")
    tokenizer = Qwen2Tokenizer.from_pretrained(folder / "tokenizer")
    with drawn_from(config.seed):
        modules = nn.ModuleDict({"transformer": make_transformer(), "text_encoder": make_text_encoder(tokenizer)})
    modules.to(device)
    of_batches = replace(config, steps=max(1, config.steps // config.repeats))  # whose steps its shares are of
    batches = Ahead(partial(make_batch, assets, of_batches, tokenizer), workers)
    attention = MatmulAttention if device.type == "cpu" and not compiled else contextlib.nullcontext

    @lru_cache(maxsize=IN_TURN if config.repeats > 1 else 1)
    def encoded(number: int) -> tuple[Batch, list[torch.Tensor]]:
        """A batch, what of it the steps need on the device, and the latents of its pictures."""
        batch = batches(number)
        with autocast(device):
            latents = [
                encode_pictures(vae, to_unit(pictures.to(device, non_blocking=True))).float()
                for pictures in batch.pictures
            ]
        there = {name: getattr(batch, name).to(device, non_blocking=True) for name in ("ids", "attends", "focus")}
        return batch._replace(pictures=[], **there), latents

    def loss(step: int) -> torch.Tensor:
        batch, (target, *references) = encoded(batch_number(step, config.repeats))
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        with autocast(device):
            text = encode_text(modules["text_encoder"], batch.ids, batch.attends)
            with attention():
                return flow_matching_loss(
                    modules["transformer"],
                    text,
                    target,
                    references,
                    generator,
                    1 + config.focus * batch.focus,
                    batch.source,
                    config.teach,
                )

    blocks = ("transformer.transformer_blocks", "transformer.single_transformer_blocks")
    optimisers = make_optimisers(modules, blocks, config.lr, config.muon_lr)

    def show(step: int, average: nn.Module) -> None:
        sheet = sample_sheet(make_pipeline(vae, average["transformer"], average["text_encoder"], tokenizer), everything)
        sheet.save(folder / "base" / f"sheet-{step:07d}.png")

    save_config(folder / "base", config)
    save_text(fingerprint(vae.encoder) + "\n", folder / "base" / LATENTS)
    with compiled_blocks(modules["transformer"]) if compiled else contextlib.nullcontext():
        train(
            modules,
            optimisers,
            loss,
            folder / "base",
            LoopConfig(
                steps=config.steps,
                warmup=config.warmup,
                save_every=save_every,
                ema=config.ema,
                show_every=show_every,
                stop_after=stop_after,
                seconds=seconds,
            ),
            show=show,
        )


LATENTS = "latents.txt"
"""In the folder of a base: the fingerprint of the encoder whose latents it knows."""


BEFORE = "before.json"
"""In the folder of a base that was restored: the call settings of the weights that it goes on from."""


def steps_before(folder: Path) -> int:
    """The steps that the base's weights had seen when they were restored; 0 for a base from nothing."""
    before = folder / "base" / BEFORE
    return json.loads(before.read_text(encoding="utf-8"))["training_steps"] if before.is_file() else 0


def restore(weights: Path, folder: Path) -> None:
    """Put an exported pipeline into the working folder, where `train_base` goes on from it at step 0.

    Raises FileExistsError where the folder holds a run of the base or of the VAE already.
    """
    for name, there in (("base", (folder / "base").exists()), ("vae", newest_step(folder / "vae") > 0)):
        if there:
            raise FileExistsError(f"{folder / name} is there already: move it away to start from {weights}")
    pipe = load(ModelSpec(str(weights), dtype="float32", device="cpu"))
    pipe.vae.save_pretrained(folder / "vae" / "final")
    shutil.copytree(weights / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
    partial = folder / "base.partial"  # renamed when it is whole: half of it would start from nothing
    shutil.rmtree(partial, ignore_errors=True)
    start_from(nn.ModuleDict({"transformer": pipe.transformer, "text_encoder": pipe.text_encoder}), partial)
    shutil.copy(weights / "call.json", partial / BEFORE)
    save_text(fingerprint(pipe.vae.encoder) + "\n", partial / LATENTS)
    put_in_place(partial, folder / "base")


def sample_sheet(pipe, assets: Assets, per_task: int = 2) -> Image.Image:
    """Validation scenes of every task: for each scene its first reference, the truth and the dense output."""
    held_out = assets.split("validation")
    pipe.set_progress_bar_config(disable=True)
    lines = []
    for number, task in enumerate(TASKS):
        tiles = []
        for seed in range(per_task):
            scene = make_scene(held_out, task, 100 + 10 * number + seed)
            reference = cv2.resize(scene.references[0], (SIZE, SIZE), interpolation=cv2.INTER_AREA)
            tiles += [reference, scene.target, generate(pipe, scene)]
        lines.append(np.hstack(tiles))
    return Image.fromarray(np.vstack(lines))


def generate(pipe, scene: Scene, seed: int = 0, steps: int = 8) -> np.ndarray:
    """The pipeline's answer to a scene, uint8 (128, 128, 3)."""
    with autocast(pipe.device):
        return np.asarray(
            pipe(
                image=[Image.fromarray(r) for r in scene.references],
                prompt=scene.prompt,
                num_inference_steps=steps,
                max_sequence_length=TEXT_LENGTH,
                text_encoder_out_layers=TEXT_LAYERS,
                generator=torch.Generator().manual_seed(seed),
                height=SIZE,
                width=SIZE,
            ).images[0]
        )
