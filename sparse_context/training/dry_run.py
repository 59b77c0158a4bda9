"""What a run would take, before it begins: `sparse-context train --dry-run`.

Tokens, memory and operations come from shapes alone (predict.py), and seconds from one measured step. What cannot fit
is refused before anything is loaded.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..families import FAMILIES
from ..pipelines.embedded import WEIGHTS
from ..pipelines.hub import class_name_of
from ..pipelines.load import DTYPES
from ..pipelines.memory import Peak, free_memory
from ..pipelines.predict import grid_of, parts_of_model
from ..pipelines.settings import read_settings
from ..pipelines.timing import now
from ..selectors.cells import Grid
from .batch import Encoding
from .config import TrainConfig
from .data import Batches
from .dropping import draw_selection
from .finetune import fast
from .launch import encodes_first, enough_memory, make_host, open_data, start_accelerator
from .loss import FlowMatching
from .options import RunConfig
from .predict import Plan, StepPrediction, StepPredictor, fits, settings_that_fit
from .processes import Processes
from .trainable import prepare, run_optimisers

GB = 10**9
SHOWN = (1.0, 0.5, 0.2, 0.1, 0.05)
"""Keep ratios of the report, those of them that the run draws."""

DRAWS = 100  # sets of tokens of which the mean is taken


@dataclass(frozen=True)
class Sizes:
    """Grids of tokens of a sample: of each reference, and of the output."""

    references: Sequence[Grid]
    output: Grid


@dataclass(frozen=True)
class Measured:
    """A step that was made: its seconds, the sizes of its samples, and the most bytes that it took beside weights and
    LoRA; None where nobody knows."""

    seconds: float
    memory: int | None
    sizes: Sizes


class Predicted:
    """What steps of a run take. Raises ValueError for a model of which nobody knows how it is built."""

    def __init__(self, model: str | None, config: TrainConfig, run: RunConfig, plan: Plan, references: int) -> None:
        """references: the most of a sample."""
        self.config, self.plan = config, plan
        self._path = str(WEIGHTS) if model is None else model
        self._class_name = class_name_of(self._path)
        self.encoders_can_come_first = encodes_first(model, replace(run, cache_latents=True, cache_text=True))
        wide = torch.float32 if model is None and plan.device == "cpu" else torch.bfloat16
        self._dtype = DTYPES.get(run.dtype, wide)
        self._text = read_settings(self._path).get("max_sequence_length")
        self._predictor = self._make(config, plan)
        self.sizes = _sizes(self._class_name, self._predictor.parts.shape.token, run, references)

    def _make(self, config: TrainConfig, plan: Plan) -> StepPredictor:
        parts = parts_of_model(self._path, self._dtype, config.kv, text=self._text)
        return StepPredictor(parts, self._class_name, config, plan)

    def step(self, keep: float | int, sizes: Sizes | None = None) -> StepPrediction:
        """A step that keeps a share or a count of the tokens of samples of these sizes; None: of the largest."""
        sizes = sizes or self.sizes
        return self._predictor(sizes.references, keep, sizes.output)

    def largest(self) -> StepPrediction:
        """The step that takes the most memory."""
        return self.step(largest_keep(self.config))

    def with_settings(self, config: TrainConfig, plan: Plan) -> StepPrediction:
        """The largest step with other settings."""
        return self._make(config, plan)(self.sizes.references, largest_keep(config), self.sizes.output)


def largest_keep(config: TrainConfig) -> float:
    """The largest share of tokens that a batch keeps, or that its teacher sees."""
    dropping = config.dropping
    sees_all = dropping.dense or config.distillation or config.preservation
    return 1.0 if sees_all else dropping.keep_max


def _sizes(class_name: str, token: int, run: RunConfig, references: int) -> Sizes:
    area = getattr(import_module(f"..families.{FAMILIES[class_name].folder}.call", __package__), "AREA", None)
    output, reference = run.sides.values()
    return Sizes(
        [grid_of(reference, reference, token, area)] * references,
        grid_of(output, output, token, area),
    )


def check_fits(predicted: Predicted, memory: int | None) -> None:
    """Raise ValueError, with the settings that would, where a run does not fit into `memory` bytes; None: unknown."""
    largest = predicted.largest()
    if memory is None or fits(largest, memory):
        return
    made = settings_that_fit(
        predicted.with_settings, predicted.config, predicted.plan, memory, predicted.encoders_can_come_first
    )
    advice = (
        "no setting makes it fit: pass a smaller resolution, fewer references, or another model"
        if made is None
        else "it fits with " + " ".join(f"--set {change}" for each in made for change in each.split())
    )
    raise ValueError(f"The largest step takes {largest.peak / GB:.1f} GB, and {memory / GB:.1f} GB are free: {advice}.")


def measure(host: Any, batches: Batches, config: TrainConfig, encoding: Encoding, accelerator: Any) -> Measured:
    """Make two steps of the largest kind (`largest_keep`), of one batch and one set each, and time the second. Nothing
    is written.

    The most memory is that of both, for AdamW makes its moments in the first.
    """
    most = largest_keep(config)
    dropping = replace(config.dropping, dense=1.0)
    if most < 1:
        dropping = replace(config.dropping, dense=0.0, keep_min=most, keep_max=most)
    every = replace(
        config,
        dropping=dropping,
        gradient_accumulation_steps=1,
        subsets=1,
        max_train_steps=2,
    )
    device = accelerator.device
    trained = prepare(host, every)
    optimisers = run_optimisers(host.transformer, trained, every)
    loss = FlowMatching(
        host, batches, every, processes=Processes(accelerator), encoding=encoding, autocast=accelerator.autocast
    )
    seconds, peak = 0.0, Peak(device)
    with fast(host.transformer, every, accelerator.mixed_precision):
        for number in range(2):
            start = now(device)
            loss(number).backward()
            nn.utils.clip_grad_norm_(trained.parameters(), every.max_grad_norm)
            for optimiser in optimisers:
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
            seconds = now(device) - start
    rows, columns = loss.current.target.shape[-2:]
    return Measured(seconds, peak.read(), Sizes(loss.current.grids, (int(rows), int(columns))))


def report(predicted: Predicted, memory: int | None, measured: Measured | None = None) -> str:
    """What the command prints. memory: bytes that are free on the device."""
    config, largest = predicted.config, predicted.largest()
    dropping, total = config.dropping, sum(rows * columns for rows, columns in predicted.sizes.references)
    lines = [
        f"{'keep':>16} {'text':>7} {'output':>7} {'references':>11} {'TFLOP':>8} {'memory':>9}"
        + (f" {'seconds':>9}" if measured else "")
    ]
    ratios = [
        keep for keep in SHOWN if dropping.keep_min <= keep <= dropping.keep_max or (keep == 1 and dropping.dense)
    ]
    shown: list[tuple[str, float | int]] = [(f"{keep:g}", keep) for keep in ratios]
    shown += [(f"overview by {factor}", max(1, round(total / factor**2))) for factor in dropping.overview_factors]
    mean = round(_mean_kept(config, predicted.sizes)) if total else 0
    shown.append(("mean of a run", mean))
    made = None if measured is None else predicted.step(largest_keep(config), measured.sizes)
    rate = None if measured is None or made is None else measured.seconds / made.flops
    for name, keep in shown:
        step = predicted.step(keep)
        line = (
            f"{name:>16} {step.tokens.text:>7,} {step.tokens.output:>7,} {step.tokens.references:>11,} "
            f"{step.flops / 1e12:>8.2f} {step.peak / GB:>5.2f} GB"
        )
        lines.append(line + (f" {rate * step.flops:>9.2f}" if rate else ""))
    parts = [f"{name} {size / GB:.2f}" for name, size in largest.weights.items()]
    parts += [f"LoRA and average {largest.trained / GB:.2f}", f"optimiser {largest.optimiser / GB:.2f}"]
    parts += [f"activations and gradients {largest.activations / GB:.2f}"]
    lines.append(f"Largest step, in GB: {', '.join(parts)}; together {largest.peak / GB:.2f}.")
    other = replace(config, gradient_checkpointing=not config.gradient_checkpointing)
    activations = predicted.with_settings(other, predicted.plan).activations / GB
    how = "with" if other.gradient_checkpointing else "without"
    lines.append(f"Activations {how} gradient checkpointing: {activations:.2f} GB.")
    if largest.before:
        lines.append(f"The encoders come first, alone, and take {largest.before / GB:.2f} GB.")
    if memory is not None:
        lines.append(f"It fits: {memory / GB:.2f} GB are free.")
    if measured is not None and made is not None and rate is not None:
        step_seconds = rate * predicted.step(mean).flops * config.gradient_accumulation_steps * config.subsets
        minutes = step_seconds * config.max_train_steps / 60
        whole = f"{minutes:.0f} minutes" if minutes < 90 else f"{minutes / 60:.1f} hours"
        batches = config.gradient_accumulation_steps * config.subsets
        lines.append(f"A batch of {made.tokens.total:,} tokens was measured: {measured.seconds:.2f} s.")
        if measured.memory is not None:
            lines.append(
                f"Beside weights and LoRA it took {measured.memory / GB:.2f} GB; "
                f"{(made.optimiser + made.activations) / GB:.2f} GB were computed."
            )
        lines.append(
            f"A step of {batches} average batches takes about "
            f"{step_seconds:.1f} s, and {config.max_train_steps:,} steps {whole}, without encoders and "
            "validation images."
        )
    return "\n".join(lines)


def _mean_kept(config: TrainConfig, sizes: Sizes) -> float:
    """How many reference tokens sets keep, overviews included."""
    grids = list(sizes.references)
    pictures = [np.zeros((rows, columns, 3), np.uint8) for rows, columns in grids]
    random = replace(config.dropping, mix={"random": 1.0})  # a kind decides which tokens are kept, not how many
    return float(np.mean([draw_selection(random, pictures, grids, [config.seed, i]).kept for i in range(DRAWS)]))


def dry_run(model: str | None, data: str, config: TrainConfig, run: RunConfig) -> str:
    """What a run would take, as text. Raises ValueError for what is wrong with its options, and where it cannot fit."""
    samples, _, spec = open_data(model, data, config, run)
    most = max((len(samples[i].references) for i in range(min(len(samples), 1000))), default=0)
    with tempfile.TemporaryDirectory() as folder:
        accelerator = start_accelerator(run, Path(folder))
        if accelerator.num_processes > 1:
            raise ValueError(
                f"dry_run is for one process, and there are {accelerator.num_processes}: start it with sparse-context "
                "train instead of accelerate launch."
            )
        spec = replace(spec, device=str(accelerator.device))
        mixed = torch.bfloat16 if accelerator.mixed_precision == "bf16" else None
        plan = Plan(
            run.quantization,
            encodes_first(model, run),
            run.validation_data is not None,
            mixed,
            accelerator.device.type,
            run.train_batch_size,
        )
        predicted = Predicted(model, config, run, plan, most)
        memory = free_memory(accelerator.device)
        check_fits(predicted, memory)
        batches = Batches(samples, run.train_batch_size, config.seed, *run.sides.values())
        short = replace(config, max_train_steps=2, gradient_accumulation_steps=1)
        host, encoding = make_host(
            model, spec, batches, [], Path(folder), short, replace(run, cache_dir=Path(folder)), accelerator
        )
        with enough_memory():
            return report(predicted, memory, measure(host, batches, config, encoding, accelerator))
