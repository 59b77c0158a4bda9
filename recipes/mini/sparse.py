"""The embedded model's fine-tuning with dropped reference tokens, on its own scenes.

Takes the shipped weights and the assets of the working folder; writes the run, and its result, to `<folder>/<name>`.
`export_adapter` writes what is shipped.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from sparse_context.families import find_host
from sparse_context.images import put_in_place
from sparse_context.pipelines.embedded import ADAPTERS, OVERVIEW, WEIGHTS, adapter_record
from sparse_context.pipelines.load import load
from sparse_context.pipelines.lora_file import NO_LORA
from sparse_context.pipelines.settings import call_settings
from sparse_context.pipelines.spec import ModelSpec
from sparse_context.trained import FILE, KEY
from sparse_context.training.batch import Encoding
from sparse_context.training.cache import fingerprint
from sparse_context.training.card import EMBEDDED, LORA_FILE
from sparse_context.training.checkpoints import has_begun, newest_step, start_from
from sparse_context.training.config import TrainConfig
from sparse_context.training.data import Example
from sparse_context.training.dropping import MIX, Dropping
from sparse_context.training.files import writing
from sparse_context.training.finetune import Limits, Run, Watch, finetune
from sparse_context.training.lora import extract_lora, save_lora
from sparse_context.training.precision import has_fast_bfloat16
from sparse_context.training.trainable import prepare

from .base import BaseConfig, batch_scenes
from .data import Assets, load_assets
from .loss import TOWARDS_NOISE
from .run_folder import default_device
from .scenes import Scene, make_scene

LORA = TrainConfig(
    rank=64,
    lora_alpha=64,
    dropping=Dropping(
        keep_max=0.6,
        dense=0.06,
        mix={"random": 0.1, "uniform": 0.15, "edges": 0.2, "saliency": 0.15, "subject": 0.4},
    ),
    subsets=3,
    distillation=1.0,
    preservation=15.0,
    focus=BaseConfig().focus,
    unseen=0.2,
    weighting_scheme="none",
    shift=6.0,
    learning_rate=7e-4,
    lr_scheduler="trapezoid",
    lr_warmup_steps=50,
    ema=0.99,
    gradient_accumulation_steps=2,
    max_train_steps=1000,
    checkpointing_steps=100,
    validation_steps=500,
)
"""The target is what the base says with all tokens: it has no noise of its own, so fewer samples do. To ask the base
costs more than to train on few tokens, so each batch is taken with three sets. Most of them are such as selectors make,
the rest scattered. What was dropped counts little, or guessing it would take most of the training. `shift` moves the
noise levels towards noise, for the first steps of a call decide the rest."""

KV = replace(
    LORA,
    kv=True,
    dropping=Dropping(dense=0.7, mix=MIX | {"subject": 0.3}, merge=(0.0, 0.3)),
    subsets=1,
    distillation=0.0,
    preservation=30.0,
    unseen=1.0,
    shift=4.0,
    learning_rate=5e-4,
    max_train_steps=2000,
)
"""Most batches keep all tokens: there the plain pipeline's answer is at hand to learn from."""

FULL = replace(
    LORA,
    full=True,
    dropping=replace(LORA.dropping, keep_max=0.8, dense=0.12),
    distillation=0.0,
    preservation=0.0,
    unseen=0.3,
    shift=TOWARDS_NOISE,
    learning_rate=3e-4,
    muon_learning_rate=7e-4,
    adam_weight_decay=0.0,
)
"""All weights, against the truth: there is no copy of the base to ask. An eighth of the sets, which have all tokens,
hold what those need."""

FULL_KV = replace(
    FULL,
    kv=True,
    dropping=replace(KV.dropping, dense=0.5, merge=(0.0,)),
    unseen=0.5,
    learning_rate=1.5e-4,
    muon_learning_rate=3.5e-4,
)
"""The same for KV mode, from the LoRA that `KV` makes (`start_adapter`): half of the sets have all tokens."""

VALIDATION = (("edit_background", 100), ("edit_object", 100), ("subject_place", 100), ("subject_pair", 100))


def to_example(scene: Scene) -> Example:
    """A scene as the trainer takes it, with the masks of its references, and of its objects if not all is edited."""
    masks = [
        Image.fromarray((np.clip(mask, 0, 1) * 255).astype(np.uint8)) for mask in (*scene.reference_masks, scene.mask)
    ]
    references = tuple(Image.fromarray(reference) for reference in scene.references)
    mask = masks.pop() if scene.focus.any() else None
    return Example(
        scene.prompt, references, Image.fromarray(scene.target), tuple(masks[: len(references)]), mask, scene.source
    )


def scene_batches(assets: Assets, batch: int, seed: int):
    """`batches(number)` for the trainer: the scenes of the base's recipe, of all tasks and sizes from the start."""
    config = replace(BaseConfig().without_easy_part, batch=batch, seed=seed + 1_000)

    def batches(number: int) -> list[Example]:
        return [to_example(scene) for scene in batch_scenes(assets, config, number)]

    return batches


def train_sparse(
    folder: Path,
    config: TrainConfig = LORA,
    *,
    name: str = "sparse",
    batch: int = 4,
    model: str | None = None,
    start: Path | None = None,
    stop_after: float | None = None,
    seconds: float | None = None,
    workers: int = 0,
    validation: Sequence[tuple[str, int]] = VALIDATION,
) -> Path:
    """Fine-tune, or continue, the run `folder/name`; returns the path of the result.

    batch: as `BaseConfig` has it. model: a folder to start from instead of the shipped weights. start: a LoRA that the
    run begins from (`start_adapter`), if it has not begun. workers: processes that compose scenes ahead of the steps; 0
    for a thread. stop_after, seconds: as in `loop.train`. Under `torchrun` several
    processes share each step. Raises ValueError and OSError in one sentence.
    """
    from accelerate import Accelerator

    if start is not None and model is not None:
        raise ValueError("A LoRA to start from is of the package's own weights: leave the model out.")
    everything = load_assets(folder / "assets.safetensors")
    device = default_device()
    accelerator = Accelerator(mixed_precision="bf16" if has_fast_bfloat16(device) else "no", cpu=device.type == "cpu")
    if start is not None and accelerator.is_main_process and not has_begun(folder / name):
        start_adapter(folder / name, start, config)
    accelerator.wait_for_everyone()
    pipe = load(ModelSpec(model, dtype="float32", device=str(device), lora=NO_LORA))
    host = find_host(pipe, call_settings(pipe), config.kv)
    held_out = everything.split("validation")
    result = finetune(
        host,
        scene_batches(everything.split("train"), batch, config.seed),
        Run(
            folder / name,
            model or EMBEDDED,
            "scenes",
            {"batch": batch, "start": None if start is None else start.name},
            resume=True,
        ),
        config,
        accelerator=accelerator,
        encoding=Encoding(workers=workers),
        watch=Watch(validation=[to_example(make_scene(held_out, task, seed)) for task, seed in validation]),
        limits=Limits(stop_after=stop_after, seconds=seconds),
    )
    accelerator.end_training()
    return result


def start_adapter(folder: Path, adapter: Path, config: TrainConfig = LORA) -> None:
    """Write a LoRA that was shipped as step 0 of the run `folder`, from which `train_sparse` goes on with `config`.

    It may be one of another base: what it learned there is nearer than nothing. It is taken at `config.lora_alpha`;
    with `config.full` what it changes is added to the weights, as `load` takes it.
    Raises ValueError for one of the other mode, of other layers or another rank, and where a run has begun in `folder`.
    """
    if newest_step(folder):
        raise ValueError(f"{folder} holds a run at step {newest_step(folder)}: name another folder.")
    if adapter_record(adapter).get("kv", False) != config.kv:
        raise ValueError(f"{adapter} and the config differ in whether they are for KV mode: take one for the same.")
    pipe = load(ModelSpec(dtype="float32", device="cpu", lora=str(adapter) if config.full else NO_LORA, kv=config.kv))
    if config.full:
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        return start_from(prepare(find_host(pipe, call_settings(pipe), config.kv), config), folder)
    trained = prepare(find_host(pipe, call_settings(pipe), config.kv), config)
    named = {name: "transformer." + name.replace("/", ".").replace(".default", "") for name in trained.state_dict()}
    own = load_file(adapter)
    shapes = {named[name]: tensor.shape for name, tensor in trained.state_dict().items()}
    if {name: tensor.shape for name, tensor in own.items()} != shapes:
        raise ValueError(
            f"{adapter} adapts other layers than a LoRA of rank {config.rank} on this model does: go on from it with "
            "all weights (full)."
        )
    trained.load_state_dict({name: own[short].float() for name, short in named.items()})
    start_from(trained, folder)


def export_adapter(folder: Path, destination: Path = WEIGHTS, scale: float = 1.0, rank: int = 64) -> Path:
    """Write the LoRA of the run in `folder` as the embedded model's own into the folder `destination`, in bf16, whole
    or not at all; returns the file. That of a run for KV mode is another file than the plain one's.

    scale: the share of its change of the weights that is taken, above 0 and up to 1. On the way from the base to the
    end of the training most of the gain comes early and most of the harm late (Wortsman et al. 2022). rank: of the LoRA
    that a run of all weights is cut down to; a run of a LoRA has its own. Raises ValueError for another scale, and for
    a run that began from other base weights, and OSError.
    """
    if not 0 < scale <= 1:
        raise ValueError(f"scale is {scale!r}: pass a share above 0 and up to 1.")
    source, tuned = folder / LORA_FILE, folder / "transformer"
    full = tuned.is_dir()
    if not full and not source.is_file():
        raise FileNotFoundError(f"{source} is missing: run `python -m recipes.mini sparse` first")
    base = load(ModelSpec(dtype="float32", device="cpu", lora=NO_LORA)).transformer
    if full:
        about = json.loads((tuned / FILE).read_text(encoding="utf-8")) | {"rank": rank}
    else:
        about = adapter_record(source)
    if about["base_weights"] != fingerprint(base):
        raise ValueError(f"The run in {folder} began from other weights than the package holds: train it on these.")
    if full:
        metadata = {"format": "pt"}
        learned = extract_lora(base, type(base).from_pretrained(tuned, dtype=torch.float32), rank)
    else:
        with safe_open(source, framework="pt") as file:
            metadata = file.metadata()
        learned = load_file(source)
    metadata |= {KEY: json.dumps(about | {"scale": scale})}
    weights = {
        name: (scale * tensor if ".lora_B." in name else tensor).to(torch.bfloat16) for name, tensor in learned.items()
    }
    result = destination / ADAPTERS["kv" if about["kv"] else "plain"].name
    partial = result.with_suffix(".partial")
    with writing(result):
        save_lora(weights, partial, metadata)
        put_in_place(partial, result)
    if not about["kv"]:  # which those for overviews lie on top of
        destination.with_name(OVERVIEW.name).unlink(missing_ok=True)
    return result


def choose(
    *,
    full: bool = False,
    kv: bool = False,
    steps: int | None = None,
    rank: int | None = None,
    rate: float = 1.0,
    distillation: float | None = None,
    mix: Mapping[str, float] | None = None,
    coverage: Sequence[float] | None = None,
    dense: bool = False,
    seed: int = 0,
    preservation: float | None = None,
    merge: Sequence[float] | None = None,
    unseen: float | None = None,
) -> TrainConfig:
    """A config from the few settings that the experiments vary; None leaves the recipe's own. rate: times the recipe's
    learning rates, above 0. The warm-up is a tenth of the steps at most."""
    config = {(True, True): FULL_KV, (True, False): FULL, (False, True): KV, (False, False): LORA}[full, kv]
    if dense:  # the control trains on what the others only preserve, and one set of all tokens is like the other
        config = replace(config, distillation=0.0, preservation=0.0, subsets=1)
    dropping = replace(
        config.dropping,
        mix=mix or config.dropping.mix,
        coverage=tuple(coverage) if coverage else config.dropping.coverage,
        merge=tuple(merge) if merge else config.dropping.merge,
        dense=1.0 if dense else config.dropping.dense,
    )
    steps = steps or config.max_train_steps
    return replace(
        config,
        kv=kv,
        dropping=dropping,
        distillation=config.distillation if distillation is None else distillation,
        preservation=config.preservation if preservation is None else preservation,
        unseen=config.unseen if unseen is None else unseen,
        seed=seed,
        rank=rank or config.rank,
        lora_alpha=rank or config.lora_alpha,
        learning_rate=rate * config.learning_rate,
        muon_learning_rate=config.muon_learning_rate and rate * config.muon_learning_rate,
        lr_warmup_steps=min(config.lr_warmup_steps, steps // 10),
        max_train_steps=steps,
    )
