"""Fine-tune the embedded model for references scaled down, or for merged tokens, in the place of dropped ones.

    python runs/train_peers.py {downscaled,merged} [--steps 100]

The same fine-tuning as `python -m recipes.mini sparse --full` (recipes/mini/sparse.py), with as many samples, each
taken three times: by the method of that name in sparse_context/bench/methods.py the references are left with a share of
their tokens, from the same range, or with all of them in an eighth of the cases. (Scaled down, a sample has other noise
each of the three times, and not one for all.) The run goes to `checkpoints/ablations/METHOD`, where `runs/ablations.py`
finds it. Merging is by content, and the tokens' places are shared by a batch, so there a batch is one sample. A run
that is stopped continues; one of merged tokens then draws other shares than it would have.

It needs the scenes' objects: `python -m recipes.mini data`.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from recipes.mini.data import load_assets
from recipes.mini.sparse import choose, scene_batches
from sparse_context.bench.methods import downscaled_grid, merge_tokens
from sparse_context.families.flux2.train import Flux2
from sparse_context.pipelines.load import load
from sparse_context.pipelines.lora_file import NO_LORA
from sparse_context.pipelines.settings import call_settings
from sparse_context.pipelines.spec import ModelSpec
from sparse_context.tokens import ReferenceTokens
from sparse_context.training.card import EMBEDDED
from sparse_context.training.config import TrainConfig
from sparse_context.training.data import Example
from sparse_context.training.dropping import Dropping
from sparse_context.training.finetune import Run, finetune

ROOT = Path(__file__).resolve().parents[1]


def draw_keeps(dropping: Dropping, count: int, rng: np.random.Generator) -> list[float]:
    """The shares of their tokens that `count` references are left with, as `dropping.draw_selection` draws them."""
    dense = rng.random() < dropping.dense
    keeps = np.exp(rng.uniform(math.log(dropping.keep_min), math.log(dropping.keep_max), count))
    return [1.0 if dense else float(keep) for keep in keeps]


class Merging(Flux2):
    """A host that merges the tokens of each reference down to a share of `dropping`, another one at every call."""

    def __init__(self, pipe, dropping: Dropping, seed: int) -> None:
        super().__init__(pipe, call_settings(pipe))
        self.dropping, self.rng = dropping, np.random.default_rng(seed)
        self.grids: list[tuple[int, int]] = []

    def reference_tokens(self, latents: Sequence[torch.Tensor]) -> ReferenceTokens:
        self.grids = [(one.shape[-2], one.shape[-1]) for one in latents]
        return super().reference_tokens(latents)

    def velocity(self, noisy, sigma, text, references, teacher=False) -> torch.Tensor:
        merged = merge_tokens(references, self.grids, draw_keeps(self.dropping, len(self.grids), self.rng))
        return super().velocity(noisy, sigma, text, merged, teacher)


def downscaled(
    batches: Callable[[int], list[Example]], times: int, token: int, dropping: Dropping, seed: int
) -> Callable[[int], list[Example]]:
    """`batches`, each of them `times` times, with references scaled down, each reference by a share of its own."""

    def smaller(number: int) -> list[Example]:
        examples, rng = batches(number // times), np.random.default_rng([seed, number])
        sides, references = [], examples[0].references
        for reference, keep in zip(references, draw_keeps(dropping, len(references), rng), strict=True):
            grid = reference.height // token, reference.width // token
            rows, columns = downscaled_grid(grid, keep)
            sides.append((columns * token, rows * token))

        def resized(pictures: tuple[Image.Image, ...]) -> tuple[Image.Image, ...]:
            return tuple(one.resize(side, Image.Resampling.LANCZOS) for one, side in zip(pictures, sides, strict=True))

        return [
            replace(one, references=resized(one.references), masks=resized(one.masks), source=None) for one in examples
        ]

    return smaller


def config_of(method: str, steps: int) -> TrainConfig:
    """The recipe with all tokens of what the method leaves: its sets are of one batch each, or its batches of one."""
    config = choose(full=True, steps=steps)
    config = replace(config, dropping=replace(config.dropping, dense=1.0), unseen=1.0)
    if method == "merged":
        return replace(config, gradient_accumulation_steps=4 * config.gradient_accumulation_steps)
    return replace(config, subsets=1, gradient_accumulation_steps=config.subsets * config.gradient_accumulation_steps)


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune the embedded model for a peer's way of saving tokens.")
    parser.add_argument("method", choices=("downscaled", "merged"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--checkpoints", type=Path, default=ROOT / "checkpoints" / "ablations", help="working folder")
    parser.add_argument("--assets", type=Path, default=ROOT / "checkpoints" / "assets.safetensors")
    arguments = parser.parse_args()

    config, dropping = config_of(arguments.method, arguments.steps), choose(full=True).dropping
    assets = load_assets(arguments.assets).split("train")
    pipe = load(ModelSpec(dtype="float32", device="cpu", lora=NO_LORA))
    if arguments.method == "merged":
        host, batch = Merging(pipe, dropping, config.seed), 1
        batches = scene_batches(assets, batch, config.seed)
    else:
        host, batch = Flux2(pipe, call_settings(pipe)), 4
        times = choose(full=True).subsets
        batches = downscaled(scene_batches(assets, batch, config.seed), times, host.token, dropping, config.seed)
    result = finetune(
        host,
        batches,
        Run(
            arguments.checkpoints / arguments.method,
            EMBEDDED,
            f"scenes, {arguments.method}",
            {"batch": batch},
            resume=True,
        ),
        config,
        accelerator=Accelerator(mixed_precision="bf16", cpu=True),
    )
    print(f"wrote {result}")


if __name__ == "__main__":
    main()
