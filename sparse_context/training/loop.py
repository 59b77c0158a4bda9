"""The training loop: one function, resumable at any kill, on one process or several.

Everything random in a step is drawn from a generator seeded by (seed, step), so that a run that was killed and resumed
sees the same batches and ends at the same weights as one that was not; no generator state is stored. A checkpoint is a
folder of safetensors files (nothing is pickled) that is renamed into place when it is whole.

Output contract, in `folder`: `step-0001000/{weights,average,optimiser}.safetensors` (the last two are kept), and
`log.jsonl` with one record every `log_every` steps. Beside the tensors are `progress.json`, what the log's next record
needs of the steps before (`Progress`), and `SHA256SUMS`, which `sha256sum -c` reads. A run that was killed and resumed
ends with the weights, checkpoints and records of an unbroken one, but for the seconds.
"""

import copy
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from .checkpoints import _check_complete, _prune, _resume, _save, _tidy, check_names
from .files import writing
from .schedules import CLOCK, SCHEDULES, _warm

SKIPPED = 20  # steps in a row without finite gradients, by which a run ends


def train(
    module: nn.Module,
    optimisers: Sequence[torch.optim.Optimizer],
    loss: Callable[[int], torch.Tensor],
    folder: Path,
    *,
    steps: int,
    warmup: int = 200,
    schedule: str = "trapezoid",
    ema: float = 0.999,
    clip: float = 1.0,
    accumulate: int = 1,
    accelerator: Any = None,
    log_every: int = 20,
    save_every: int = 200,
    keep_last: int = 2,
    show: Callable[[int, nn.Module], None] | None = None,
    show_every: int = 0,
    log: Callable[[int, dict], None] | None = None,
    stop_after: float | None = None,
    seconds: float | None = None,
) -> nn.Module:
    """Minimise `loss(batch)` over the parameters of `module` and return the averaged (EMA) copy.

    Step s averages the gradients of `loss(s * accumulate)` to `loss(s * accumulate + accumulate - 1)`, and with an
    `accelerate.Accelerator` those of all its processes; each must draw its own batches. `module` may be a part of what
    the loss runs through, as an adapter is: nothing is wrapped, gradients are averaged where they end up. A step
    whose gradients are not finite changes nothing, and the log counts it as `skipped`. `schedule` is a name of
    `SCHEDULES`. An `ema` of 0 averages nothing and returns `module` itself.

    Continues from the newest checkpoint in `folder`, if there is one. `show(step, average)` runs every `show_every`
    steps and after the last, by the clock too (0: never), for sample sheets, and again where a run goes on from such a
    step, for a kill may have come before it; `log(step, record)` beside every record of
    the log. `stop_after` is a number of seconds after which the run saves and returns. With `seconds` it does so then,
    and `schedule` goes by the clock, as if the last of `steps` came at that time (warm-up stays in steps): for a
    machine that is there for so long, and of unknown speed. Resumed, such a run has all its seconds again.
    Raises OSError, in one sentence, where a file cannot be written or a checkpoint not be continued, and ValueError
    where `SKIPPED` steps in a row were skipped; what was written before stays whole.
    """
    main = accelerator is None or accelerator.is_main_process
    several = accelerator is not None and accelerator.num_processes > 1
    folder.mkdir(parents=True, exist_ok=True)
    check_names(folder)
    average = copy.deepcopy(module).eval().requires_grad_(False) if ema else module
    first, progress, proven = _resume(folder, module, average, optimisers)
    if several:
        _agree_on_start(module, average, first, accelerator)
    if main:
        _tidy(folder, first)
        _prune(folder, keep_last)
    base_rates = [group["lr"] for o in optimisers for group in o.param_groups]
    started = time.monotonic()
    window: list[torch.Tensor] = []  # the losses that are still on the device
    if seconds is not None and not seconds > 0:
        raise ValueError(f"seconds is {seconds!r}: pass a number above 0.")
    stop_after = min((limit for limit in (stop_after, seconds) if limit is not None), default=None)
    bar = tqdm(
        range(first, steps), initial=first, total=steps, desc=folder.name, unit="step", mininterval=5, disable=not main
    )
    if main and show is not None and show_every > 0 and 0 < first and (first % show_every == 0 or first == steps):
        show(first, average)
    for step in bar:
        factor = SCHEDULES[schedule](step, steps, warmup)
        if seconds is not None:
            passed = (time.monotonic() - started) / seconds
            if several:  # one clock for all, or their weights would part
                passed = accelerator.reduce(torch.tensor(passed, device=accelerator.device), "mean").item()
            factor = SCHEDULES[schedule](round(min(passed, 1.0) * CLOCK), CLOCK, 0)
            factor *= 1.0 if schedule == "constant" else _warm(step, warmup)
        for group, rate in zip((g for o in optimisers for g in o.param_groups), base_rates, strict=True):
            group["lr"] = rate * factor
        for part in range(accumulate):
            value = loss(step * accumulate + part)
            (value / accumulate).backward()
            window.append(value.detach())
        if several:
            _average_gradients(module, accelerator)
        if not proven:
            _check_complete(folder, first, optimisers)
            proven = True
        norm = nn.utils.clip_grad_norm_(module.parameters(), clip)
        if torch.isfinite(norm):
            progress.in_a_row = 0
            for optimiser in optimisers:
                optimiser.step()
        else:
            progress.skipped, progress.in_a_row = progress.skipped + 1, progress.in_a_row + 1
            if progress.in_a_row >= SKIPPED:
                raise ValueError(
                    f"The gradients of steps {step + 2 - SKIPPED} to {step + 1} are not finite, so nothing is learned "
                    "any more: begin a new run with a lower learning rate, or without mixed precision."
                )
        module.zero_grad(set_to_none=True)
        if average is not module:
            _follow(average, module, min(ema, (step + 1) / (step + 10)))
        out_of_time = stop_after is not None and time.monotonic() - started > stop_after
        if several and stop_after is not None:  # all stop where the first one does
            out_of_time = bool(accelerator.reduce(norm.new_tensor(float(out_of_time)), "sum") > 0)
        last = step + 1 == steps or (out_of_time and stop_after == seconds)
        logs = (step + 1) % log_every == 0 or step + 1 == steps
        saves = (step + 1) % save_every == 0 or last or out_of_time
        if logs or saves:
            losses = torch.stack(window)
            progress.losses += (accelerator.reduce(losses, "mean") if several else losses).tolist()
            window.clear()
        if logs:
            mean = torch.tensor(progress.losses, dtype=torch.float64).mean().item()
            bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
            record = {
                "step": step + 1,
                "loss": mean,
                "norm": norm.item(),
                "skipped": progress.skipped,
                "seconds": time.monotonic() - started,
            }
            progress.losses, progress.skipped = [], 0
            if main:
                with writing(folder / "log.jsonl"), (folder / "log.jsonl").open("ab") as f:
                    f.write(json.dumps(record).encode() + b"\n")
                if log is not None:
                    log(step + 1, {**record, "learning rate": base_rates[0] * factor})
        if main and saves:
            for group, rate in zip((g for o in optimisers for g in o.param_groups), base_rates, strict=True):
                group["lr"] = rate
            _save(folder, step + 1, module, average, optimisers, keep_last, progress)
        shows = show is not None and show_every > 0 and ((step + 1) % show_every == 0 or last)
        if main and show is not None and shows:
            show(step + 1, average)
        if several and ((step + 1) % save_every == 0 or shows):
            accelerator.wait_for_everyone()
        if out_of_time:
            break
    for group, rate in zip((g for o in optimisers for g in o.param_groups), base_rates, strict=True):
        group["lr"] = rate
    if several:
        accelerator.wait_for_everyone()
    return average


def _average_gradients(module: nn.Module, accelerator: Any) -> None:
    for parameter in module.parameters():
        if parameter.requires_grad:
            own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = accelerator.reduce(own, "mean")


@torch.no_grad()
def _agree_on_start(module: nn.Module, average: nn.Module, first: int, accelerator: Any) -> None:
    """All processes start from the weights of the first, and have found the same checkpoint."""
    from accelerate.utils import broadcast

    steps = accelerator.gather(torch.tensor([first], device=accelerator.device)).tolist()
    if len(set(steps)) > 1:
        raise OSError(
            f"The processes found checkpoints of different steps ({', '.join(map(str, steps))}): they need a folder "
            "that all of them share."
        )
    for tensor in {id(t): t for m in (module, average) for t in m.state_dict().values()}.values():
        tensor.copy_(broadcast(tensor))


@torch.no_grad()
def _follow(average: nn.Module, module: nn.Module, decay: float) -> None:
    torch._foreach_lerp_(list(average.parameters()), list(module.parameters()), 1 - decay)
    for kept, new in zip(average.buffers(), module.buffers(), strict=True):
        kept.copy_(new)
