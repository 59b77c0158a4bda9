"""The training loop: one function, resumable at any kill, on one process or several.

Everything random in a step is drawn from a generator seeded by (seed, step), so that a run that was killed and resumed
sees the same batches and ends at the same weights as one that was not; no generator state is stored. A checkpoint is a
folder of safetensors files (nothing is pickled) that is renamed into place when it is whole.

Output contract, in `folder`: `step-0001000/{weights,average,optimiser}.safetensors` (the last two are kept), and
`log.jsonl` with one record every `log_every` steps.
"""

import contextlib
import copy
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from ..images import follow_folder
from .muon import Muon

# Schedules: (step, steps, warmup) -> the factor on the learning rate -------------------------------------------------


def learning_rate(step: int, steps: int, warmup: int) -> float:
    """The factor on the learning rate at `step`: up over `warmup` steps, flat, down to 0 over the last quarter."""
    return min(_warm(step, warmup), (steps - step) / (steps / 4))


def constant(step: int, steps: int, warmup: int) -> float:
    """1 from the first step to the last."""
    return 1.0


def constant_with_warmup(step: int, steps: int, warmup: int) -> float:
    """Up over `warmup` steps, then flat."""
    return _warm(step, warmup)


def linear(step: int, steps: int, warmup: int) -> float:
    """Up over `warmup` steps, then straight down to 0."""
    return min(_warm(step, warmup), (steps - step) / max(steps - warmup, 1))


def cosine(step: int, steps: int, warmup: int) -> float:
    """Up over `warmup` steps, then down to 0 along half a cosine."""
    way = max(step - warmup, 0) / max(steps - warmup, 1)
    return min(_warm(step, warmup), 0.5 * (1 + math.cos(math.pi * way)))


def _warm(step: int, warmup: int) -> float:
    return min(1.0, (step + 1) / max(warmup, 1))


SKIPPED = 20  # steps in a row without finite gradients, by which a run ends

CLOCK = 10_000  # as many steps a run by the clock has, for its schedule

SCHEDULES: Mapping[str, Callable[[int, int, int], float]] = {
    "constant": constant,
    "constant_with_warmup": constant_with_warmup,
    "linear": linear,
    "cosine": cosine,
    "trapezoid": learning_rate,
}


@contextlib.contextmanager
def drawn_from(seed: int) -> Iterator[None]:
    """What layers draw from torch's global generator as they are built on the CPU comes from `seed` inside.

    Afterwards that generator is where it was before, for it is the user's.
    """
    with torch.random.fork_rng(devices=()), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        yield


def make_optimisers(
    module: nn.Module, matrices: Sequence[str], lr: float, muon_lr: float, weight_decay: float = 0.0
) -> list[torch.optim.Optimizer]:
    """Muon, with its usual decay of 0.01, on the matrices inside the children named by `matrices`; on everything else
    AdamW with `weight_decay`."""
    inside = [
        p for n, p in module.named_parameters() if p.requires_grad and p.ndim == 2 and n.startswith(tuple(matrices))
    ]
    chosen = {id(p) for p in inside}
    rest = [p for p in module.parameters() if p.requires_grad and id(p) not in chosen]
    optimisers: list[torch.optim.Optimizer] = []
    if rest:  # a LoRA may lie inside the blocks as a whole
        optimisers.append(torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=weight_decay))
    if inside:
        optimisers.append(Muon(inside, lr=muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
    return optimisers


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
    steps and after the last, by the clock too (0: never), for sample sheets; `log(step, record)` beside every record of
    the log. `stop_after` is a number of seconds after which the run saves and returns. With `seconds` it does so then,
    and `schedule` goes by the clock, as if the last of `steps` came at that time (warm-up stays in steps): for a
    machine that is there for so long, and of unknown speed. Resumed, such a run has all its seconds again.
    Raises OSError, in one sentence, where a file cannot be written, and ValueError where `SKIPPED` steps in a row were
    skipped; what was written before stays whole.
    """
    main = accelerator is None or accelerator.is_main_process
    several = accelerator is not None and accelerator.num_processes > 1
    folder.mkdir(parents=True, exist_ok=True)
    average = copy.deepcopy(module).eval().requires_grad_(False) if ema else module
    first = _resume(folder, module, average, optimisers)
    if several:
        _agree_on_start(module, average, first, accelerator)
    if main:
        _tidy(folder, first)
    base_rates = [group["lr"] for o in optimisers for group in o.param_groups]
    started, window = time.monotonic(), []
    skipped, in_a_row = 0, 0
    if seconds is not None and not seconds > 0:
        raise ValueError(f"seconds is {seconds!r}: pass a number above 0.")
    stop_after = min((limit for limit in (stop_after, seconds) if limit is not None), default=None)
    bar = tqdm(range(first, steps), initial=first, total=steps, desc=folder.name, unit="step", mininterval=5,
               disable=not main)  # fmt: skip
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
        norm = nn.utils.clip_grad_norm_(module.parameters(), clip)
        if torch.isfinite(norm):
            in_a_row = 0
            for optimiser in optimisers:
                optimiser.step()
        else:
            skipped, in_a_row = skipped + 1, in_a_row + 1
            if in_a_row == SKIPPED:
                raise ValueError(
                    f"The gradients of steps {step + 2 - SKIPPED} to {step + 1} are not finite, so nothing is learned "
                    "any more: begin a new run with a lower learning rate, or without mixed precision."
                )
        module.zero_grad(set_to_none=True)
        if average is not module:
            _follow(average, module, min(ema, (step + 1) / (step + 10)))
        if (step + 1) % log_every == 0 or step + 1 == steps:
            mean = torch.stack(window).mean()
            mean = (accelerator.reduce(mean, "mean") if several else mean).item()
            window.clear()
            bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
            record = {"step": step + 1, "loss": mean, "norm": norm.item(), "skipped": skipped,
                      "seconds": time.monotonic() - started}  # fmt: skip
            skipped = 0
            if main:
                with writing(folder / "log.jsonl"), (folder / "log.jsonl").open("a") as f:
                    f.write(json.dumps(record) + "\n")
                if log is not None:
                    log(step + 1, {**record, "learning rate": base_rates[0] * factor})
        out_of_time = stop_after is not None and time.monotonic() - started > stop_after
        if several and stop_after is not None:  # all stop where the first one does
            out_of_time = bool(accelerator.reduce(norm.new_tensor(float(out_of_time)), "sum") > 0)
        last = step + 1 == steps or (out_of_time and stop_after == seconds)
        if main and ((step + 1) % save_every == 0 or last or out_of_time):
            for group, rate in zip((g for o in optimisers for g in o.param_groups), base_rates, strict=True):
                group["lr"] = rate
            _save(folder, step + 1, module, average, optimisers, keep_last)
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


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoints by their steps. Copies that somebody put beside them under other names are none."""
    named = [p for p in folder.glob("step-*") if re.fullmatch(r"step-\d+", p.name) and p.is_dir()]
    return sorted(named, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _tidy(folder: Path, first: int) -> None:
    """Remove what a kill left behind: halves of checkpoints and files, and log records of steps to be taken again."""
    for partial in folder.glob("step-*.partial"):
        shutil.rmtree(partial)
    for part in folder.glob(".*.part"):  # of images.py
        part.unlink()
    log = folder / "log.jsonl"
    if log.is_file():
        kept = []
        for line in log.read_text(errors="replace").splitlines(keepends=True):
            with contextlib.suppress(ValueError, KeyError, TypeError):  # half a line, or none of a log
                kept += [line] if line.endswith("\n") and json.loads(line)["step"] <= first else []
        with writing(log):
            log.with_suffix(".partial").write_text("".join(kept))
            log.with_suffix(".partial").replace(log)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold `folder` for one run; ends with the process, however that ends. Raises ValueError where another holds it.

    A folder that was not there is made, and removed again if nothing was written.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"Another run is writing into {folder}: wait for its end, or name another folder.") from error
    except OSError as error:
        raise OSError(f"{folder} cannot be written ({error.strerror or error}): name another folder.") from error
    try:
        yield
    finally:
        (folder / ".lock").unlink(missing_ok=True)
        lock.release()
        if made:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """What goes wrong while `path` is written, as one sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split()).rstrip(".")
        raise OSError(
            f"{path} could not be written ({reason}): free some space and resume; older checkpoints are whole."
        ) from error


def _save(folder: Path, step: int, module: nn.Module, average: nn.Module, optimisers, keep_last: int) -> None:
    whole = folder / f"step-{step:07d}"
    partial = whole.with_suffix(".partial")
    try:
        with writing(whole):
            shutil.rmtree(partial, ignore_errors=True)  # of a kill
            partial.mkdir()
            save_file(_own(module.state_dict()), partial / "weights.safetensors")
            save_file(_own(average.state_dict()), partial / "average.safetensors")
            state = {
                f"{i}.{index}.{name}": tensor
                for i, optimiser in enumerate(optimisers)
                for index, entry in optimiser.state_dict()["state"].items()
                for name, tensor in entry.items()
            }
            save_file(_own(state), partial / "optimiser.safetensors")
            follow_folder(partial)
            for path in (*partial.iterdir(), partial):
                _sync(path)
            shutil.rmtree(whole, ignore_errors=True)
            partial.rename(whole)
            _sync(folder)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for old in _checkpoints(folder)[:-keep_last]:
        shutil.rmtree(old.rename(old.with_suffix(".partial")))  # so that half of it is never taken for a whole one


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _own(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous copies: safetensors refuses tensors that share memory, as tied embeddings do."""
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


def newest_step(folder: Path) -> int:
    """The number of steps that the newest checkpoint in `folder` has seen; 0 without one."""
    checkpoints = _checkpoints(folder)
    return _step(checkpoints[-1]) if checkpoints else 0


def has_begun(folder: Path) -> bool:
    """Whether `folder` holds a checkpoint, be it of step 0."""
    return bool(_checkpoints(folder))


def _resume(folder: Path, module: nn.Module, average: nn.Module, optimisers) -> int:
    """Load the newest checkpoint and return the number of steps that it has seen (0 without one)."""
    checkpoints = _checkpoints(folder)
    if not checkpoints:
        return 0
    newest = checkpoints[-1]
    try:
        module.load_state_dict(load_file(newest / "weights.safetensors"))
        if average is not module:
            average.load_state_dict(load_file(newest / "average.safetensors"))
        flat = load_file(newest / "optimiser.safetensors")
    except (OSError, SafetensorError, RuntimeError) as error:  # RuntimeError: weights of other names or shapes
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:200].rstrip(".")
        raise OSError(
            f"The checkpoint {newest} cannot be continued ({reason}): delete it, and the run continues from the one "
            "before."
        ) from error
    for i, optimiser in enumerate(optimisers):
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, tensor in flat.items():
            which, index, name = key.split(".", 2)
            if int(which) == i:
                state.setdefault(int(index), {})[name] = tensor
        optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    return _step(newest)


def start_from(module: nn.Module, folder: Path) -> None:
    """Write the weights of `module` as the checkpoint of step 0, from which `train` goes on with fresh optimisers."""
    folder.mkdir(parents=True, exist_ok=True)
    _save(folder, 0, module, module, (), keep_last=1)


def load_average(folder: Path, module: nn.Module) -> int:
    """Load the averaged weights of the newest checkpoint in `folder` into `module` and return its step."""
    checkpoints = _checkpoints(folder)
    if not checkpoints:
        raise FileNotFoundError(f"{folder} holds no checkpoint: run the step of the recipe that writes it first")
    module.load_state_dict(load_file(checkpoints[-1] / "average.safetensors"))
    return _step(checkpoints[-1])
