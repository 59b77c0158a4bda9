"""The training loop: one function, resumable at any kill, on one process or several.

Everything random in a step is drawn from a generator seeded by (seed, step), so that a run that was killed and resumed
sees the same batches and ends at the same weights as one that was not; no generator state is stored. A checkpoint is a
folder of safetensors files (nothing is pickled) that is renamed into place when it is whole.

Output contract, in `folder`: `step-0001000/{weights,average,optimiser}.safetensors` (the last `keep_last`), and
`log.jsonl` with one record every `log_every` steps. Beside the tensors are `progress.json`, what the log's next record
needs of the steps before (`Progress`), and `SHA256SUMS`, which `sha256sum -c` reads. A run that was killed and resumed
ends with the weights, checkpoints and records of an unbroken one, but for the seconds.
"""

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from .checkpoint_files import gather
from .checkpoints import Checkpoints, Progress
from .files import writing
from .pace import Pace, scaled
from .processes import Processes
from .sharding import is_sharded, part, whole

SKIPPED = 20  # steps in a row without finite gradients, by which a run ends


@dataclass(frozen=True)
class LoopConfig:
    """How long a loop trains, and what it does every so many steps. Raises ValueError for `seconds` not above 0.

    `schedule` is a name of `SCHEDULES`, with `warmup` steps. A step averages the gradients of `accumulate` batches and
    clips their norm to `clip`. `ema` is the decay of the weights' average; 0 averages nothing. `save_every` steps there
    is a checkpoint, of which the `keep_last` stay.

    `stop_after` is a number of seconds after which the run saves and returns. With `seconds` it does so then, and
    `schedule` goes by the clock, as if the last of `steps` came at that time (warm-up stays in steps): for a machine
    that is there for so long, and of unknown speed. Resumed, such a run has all its seconds again.
    """

    steps: int
    warmup: int = 200
    schedule: str = "trapezoid"
    ema: float = 0.999
    clip: float = 1.0
    accumulate: int = 1
    log_every: int = 20
    save_every: int = 200
    keep_last: int = 2
    show_every: int = 0
    stop_after: float | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if self.seconds is not None and not self.seconds > 0:
            raise ValueError(f"seconds is {self.seconds!r}: pass a number above 0.")

    def shows(self, step: int, last: bool) -> bool:
        """Whether there is a sample sheet after so many steps."""
        return self.show_every > 0 and (step % self.show_every == 0 or last)


def train(
    module: nn.Module,
    optimisers: Sequence[torch.optim.Optimizer],
    loss: Callable[[int], torch.Tensor],
    folder: Path,
    config: LoopConfig,
    *,
    accelerator: Any = None,
    show: Callable[[int, nn.Module], None] | None = None,
    log: Callable[[int, dict], None] | None = None,
) -> nn.Module:
    """Minimise `loss(batch)` over the parameters of `module` and return the averaged (EMA) copy, or itself without one.

    Step s averages the gradients of `loss(s * accumulate)` to `loss(s * accumulate + accumulate - 1)`, and with an
    `accelerate.Accelerator` those of all its processes; each must draw its own batches. `module` may be a part of what
    the loss runs through, as an adapter is: nothing is wrapped, gradients are averaged where they end up. Where its
    weights are sharded (sharding.py), the average and the optimisers' states are so too, and checkpoints are as without
    that. A step whose gradients are not finite changes nothing, and the log counts it as `skipped`.

    Continues from the newest checkpoint in `folder`, if there is one. `show(step, average)` runs every `show_every`
    steps and after the last, by the clock too (0: never), for sample sheets, and again where a run goes on from such a
    step, for a kill may have come before it: in the main process, and with sharded weights in all.
    `log(step, record)` runs beside every record of the log.
    Raises OSError, in one sentence, where a file cannot be written or a checkpoint not be continued, and ValueError
    where `SKIPPED` steps in a row were skipped; what was written before stays whole.
    """
    processes, checkpoints = Processes(accelerator, is_sharded(module)), Checkpoints(folder, config.keep_last)
    average = copy.deepcopy(module).eval().requires_grad_(False) if config.ema else module
    first, progress, proven = _start(checkpoints, processes, module, average, optimisers)
    pace = Pace(config.steps, config.warmup, config.schedule, config.stop_after, config.seconds, processes)
    show = show if processes.main or processes.sharded else None
    if show is not None and first > 0 and config.shows(first, first == config.steps):
        show(first, average)
    losses: list[torch.Tensor] = []  # those that are still on the device
    bar = _bar(folder.name, first, config.steps, processes)
    for step in bar:
        factor = pace.factor(step)
        with scaled(optimisers, factor) as rates:
            for batch in range(step * config.accumulate, (step + 1) * config.accumulate):
                value = loss(batch)
                (value / config.accumulate).backward()
                losses.append(value.detach())
            processes.average_gradients(module)
            if not proven:
                checkpoints.check_complete(first, optimisers)
                proven = True
            norm = _update(module, optimisers, config.clip)
        _count(progress, step, bool(torch.isfinite(norm)))
        module.zero_grad(set_to_none=True)
        if average is not module:
            _follow(average, module, min(config.ema, (step + 1) / (step + 10)))
        taken = step + 1
        stops = pace.is_over()
        last = taken == config.steps or (stops and pace.ends_by_the_clock)
        logs = taken % config.log_every == 0 or taken == config.steps
        saves = taken % config.save_every == 0 or last or stops
        if logs or saves:
            progress.losses += processes.mean(torch.stack(losses).view(-1, config.accumulate).mean(1)).tolist()
            losses.clear()
        if logs:
            record = _record(progress, taken, norm, pace)
            bar.set_postfix(loss=f"{record['loss']:.4f}", refresh=False)
            if processes.main:
                _write(folder, record, rates[0] * factor, log)
        if saves and processes.main:
            checkpoints.save(taken, module, average, optimisers, progress)
        elif saves and processes.sharded:
            gather(module, average, optimisers)
        if show is not None and config.shows(taken, last):
            show(taken, average)
        if taken % config.save_every == 0 or config.shows(taken, last):
            processes.wait()
        if stops:
            break
    processes.wait()
    return average


def _start(
    checkpoints: Checkpoints,
    processes: Processes,
    module: nn.Module,
    average: nn.Module,
    optimisers: Sequence[torch.optim.Optimizer],
) -> tuple[int, Progress, bool]:
    """Go on from the newest checkpoint, with all processes at the same weights, and tidy the folder."""
    checkpoints.folder.mkdir(parents=True, exist_ok=True)
    checkpoints.check_names()
    first, progress, proven = checkpoints.resume(module, average, optimisers)
    processes.agree_on_start(module, average, first)
    if processes.main:
        checkpoints.tidy(first)
        checkpoints.prune()
    return first, progress, proven


def _bar(name: str, first: int, steps: int, processes: Processes) -> Any:
    steps_left = range(first, steps)
    return tqdm(
        steps_left, initial=first, total=steps, desc=name, unit="step", mininterval=5, disable=not processes.main
    )


def _update(module: nn.Module, optimisers: Sequence[torch.optim.Optimizer], clip: float) -> torch.Tensor:
    """Take a step, unless gradients are not finite; returns their norm."""
    norm = whole(nn.utils.clip_grad_norm_(module.parameters(), clip))
    if torch.isfinite(norm):
        for optimiser in optimisers:
            optimiser.step()
    return norm


def _count(progress: Progress, step: int, finite: bool) -> None:
    """Count a step that was skipped. Raises ValueError where the last `SKIPPED` all were."""
    if finite:
        progress.in_a_row = 0
        return
    progress.skipped, progress.in_a_row = progress.skipped + 1, progress.in_a_row + 1
    if progress.in_a_row >= SKIPPED:
        raise ValueError(
            f"The gradients of steps {step + 2 - SKIPPED} to {step + 1} are not finite, so nothing is learned "
            "any more: begin a new run with a lower learning rate, or without mixed precision."
        )


def _record(progress: Progress, step: int, norm: torch.Tensor, pace: Pace) -> dict[str, Any]:
    """The log's record of the steps since the last one, which begins anew."""
    record = {
        "step": step,
        "loss": torch.tensor(progress.losses, dtype=torch.float64).mean().item(),
        "norm": norm.item(),
        "skipped": progress.skipped,
        "seconds": pace.elapsed(),
    }
    progress.losses, progress.skipped = [], 0
    return record


def _write(folder: Path, record: dict[str, Any], rate: float, log: Callable[[int, dict], None] | None) -> None:
    with writing(folder / "log.jsonl"), (folder / "log.jsonl").open("ab") as file:
        file.write(json.dumps(record).encode() + b"\n")
    if log is not None:
        log(record["step"], {**record, "learning rate": rate})


@torch.no_grad()
def _follow(average: nn.Module, module: nn.Module, decay: float) -> None:
    torch._foreach_lerp_([part(p) for p in average.parameters()], [part(p) for p in module.parameters()], 1 - decay)
    for kept, new in zip(average.buffers(), module.buffers(), strict=True):
        kept.copy_(new)
