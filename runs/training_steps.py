"""Training steps of the embedded model, one way in a process of its own: what runs/training_speed.py starts."""

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial, wraps
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch

from recipes.mini.base import BaseConfig, restore, train_base
from recipes.mini.sparse import FULL, LORA
from sparse_context.embedded.demo import read_examples
from sparse_context.families import find_host
from sparse_context.pipelines.embedded import WEIGHTS
from sparse_context.pipelines.load import load
from sparse_context.pipelines.lora_file import NO_LORA
from sparse_context.pipelines.settings import call_settings
from sparse_context.pipelines.spec import ModelSpec
from sparse_context.training.config import TrainConfig
from sparse_context.training.data import Example
from sparse_context.training.dropping import Dropping
from sparse_context.training.finetune import Run, finetune

KEEP = 0.35
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


class Kind(NamedTuple):
    """What is trained. config: of `finetune`, or None for the recipe of the embedded base. batch: samples. references:
    of each, in what `finetune` gets."""

    config: TrainConfig | None
    batch: int = 4
    references: int = 1


PLAIN = replace(LORA, subsets=1, distillation=0.0, preservation=0.0, gradient_accumulation_steps=1)
KINDS = {
    "LoRA": Kind(TrainConfig(rank=64, lora_alpha=64)),
    "LoRA, teacher and three sets a batch": Kind(replace(LORA, gradient_accumulation_steps=1)),
    "all weights, Muon": Kind(replace(FULL, subsets=1, gradient_accumulation_steps=1)),
    "the base's recipe": Kind(None),
    "dense": Kind(replace(PLAIN, dropping=Dropping(dense=1.0)), batch=2, references=4),
    "sparse": Kind(
        replace(PLAIN, dropping=Dropping(keep_min=KEEP, keep_max=KEEP, dense=0.0, mix={"random": 1.0})),
        batch=2,
        references=4,
    ),
}


def take_steps(kind: Kind, folder: Path, assets: Path, bfloat16: bool, compiled: bool) -> None:
    """Train until the process ends."""
    endless = 10**6
    if kind.config is None:
        (folder / "assets.safetensors").symlink_to(assets.resolve())
        restore(WEIGHTS, folder)
        return train_base(folder, BaseConfig(steps=endless, batch=kind.batch), save_every=endless, compiled=compiled)
    from accelerate import Accelerator

    config = replace(kind.config, max_train_steps=endless, checkpointing_steps=endless, validation_steps=0)
    if compiled:
        config = replace(config, compile=True)
    pipe = load(ModelSpec(dtype="float32", device="cpu", lora=NO_LORA))
    finetune(
        find_host(pipe, call_settings(pipe)),
        partial(scenes, kind),
        Run(folder / "run", "embedded", "demo"),
        config,
        accelerator=Accelerator(mixed_precision="bf16" if bfloat16 else "no", cpu=True),
    )


def scenes(kind: Kind, number: int) -> list[Example]:
    """A batch of the demo's scenes."""
    found = [scene for scene in read_examples() if len(scene["references"]) == kind.references]
    taken = [found[(kind.batch * number + i) % len(found)] for i in range(kind.batch)]
    sides = [picture.size for picture in taken[0]["references"]]
    return [
        Example(
            scene["prompt"],
            tuple(picture.resize(side) for picture, side in zip(scene["references"], sides, strict=True)),
            scene["truth"],
            (None,) * kind.references,
        )
        for scene in taken
    ]


def watch(figure: Callable[[], float]) -> None:
    """Print what each step takes by `figure`, whole and of it the encoders' forwards and the optimisers, as a line of
    JSON. A step begins with the optimisers of the step before, when a line has come in."""
    from diffusers.models.autoencoders.vae import Encoder
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

    spent: Counter[str] = Counter()
    first, began, optimising = None, 0.0, 0.0

    def timed(forward: Callable) -> Callable:
        @wraps(forward)
        def call(*args: Any, **kwargs: Any) -> Any:
            start = figure()
            try:
                return forward(*args, **kwargs)
            finally:
                spent["encoders"] += figure() - start

        return call

    def before(optimiser: torch.optim.Optimizer, *_: Any) -> None:
        nonlocal first, began, optimising
        if first is None:
            first = optimiser
        elif optimiser is first:
            print(json.dumps({"step": figure() - began, **spent}), flush=True)
        if optimiser is first:
            if not sys.stdin.readline():  # the one that asks for steps is done, or gone
                sys.exit()
            spent.clear()
            began = figure()
        optimising = figure()

    def after(*_: Any) -> None:
        spent["optimiser"] += figure() - optimising

    for encoder in (Encoder, Qwen3Model):
        encoder.forward = timed(encoder.forward)
    register_optimizer_step_pre_hook(before)
    register_optimizer_step_post_hook(after)


Shape = tuple[int, ...]


def flop_counter() -> Any:
    """torch's own, which knows neither the fused attention of CPUs nor that of training/attention.py."""
    from torch.utils.flop_counter import FlopCounterMode

    def forward(query: Shape, key: Shape, *rest: Any, **named: Any) -> int:
        return 4 * prod(query) * key[2]

    def backward(gradient: Shape, query: Shape, key: Shape, *rest: Any, **named: Any) -> int:
        return 10 * prod(query) * key[2]

    def backward_with_weights(gradient: Shape, query: Shape, key: Shape, *rest: Any, **named: Any) -> int:
        return 8 * prod(query) * key[2]

    known = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: forward,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
        torch.ops.sparse_context.attend: forward,
        torch.ops.sparse_context.attend_backward: backward_with_weights,
    }
    return FlopCounterMode(display=False, custom_mapping=known)


def main() -> None:
    parser = argparse.ArgumentParser(description="Take training steps, one for each line that comes in.")
    parser.add_argument("way", choices=("before", "now", "compiled", "count"))
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("clock", choices=CLOCKS)
    parser.add_argument("assets", type=Path)
    parser.add_argument("--bfloat16", action="store_true")
    arguments = parser.parse_args()
    if arguments.way in ("now", "compiled"):
        from sparse_context.training.memory import keep_freed_memory

        keep_freed_memory()
    counts = arguments.way == "count"
    counter = flop_counter() if counts else None
    watch(CLOCKS[arguments.clock] if counter is None else counter.get_total_flops)
    with tempfile.TemporaryDirectory() as folder, counter or nullcontext():
        compiled = arguments.way == "compiled"
        take_steps(KINDS[arguments.kind], Path(folder), arguments.assets, arguments.bfloat16, compiled)


if __name__ == "__main__":
    main()
