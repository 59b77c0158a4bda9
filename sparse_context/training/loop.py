"""The training loop: one function, resumable at any kill, on one process or several.

Everything random in a step is drawn from a generator seeded by (seed, step), so that a run that was killed and resumed
sees the same batches and ends at the same weights as one that was not; no generator state is stored. A checkpoint is a
folder of safetensors files (nothing is pickled) that is renamed into place when it is whole.

Output contract, in `folder`: `step-0001000/{weights,average,optimiser}.safetensors` (the last two are kept), and
`log.jsonl` with one record every `log_every` steps. Beside the tensors are `progress.json`, what the log's next record
needs of the steps before (`Progress`), and `SHA256SUMS`, which `sha256sum -c` reads. A run that was killed and resumed
ends with the weights, checkpoints and records of an unbroken one, but for the seconds.
"""

import contextlib
import copy
import errno
import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from ..images import FULL, error_number, follow_folder, put_in_place
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
    bar = tqdm(range(first, steps), initial=first, total=steps, desc=folder.name, unit="step", mininterval=5,
               disable=not main)  # fmt: skip
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
            record = {"step": step + 1, "loss": mean, "norm": norm.item(), "skipped": progress.skipped,
                      "seconds": time.monotonic() - started}  # fmt: skip
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


# Checkpoints and the log --------------------------------------------------------------------------------------------

TENSORS = ("weights.safetensors", "average.safetensors", "optimiser.safetensors")
PROGRESS_FILE = "progress.json"
SUMS_FILE = "SHA256SUMS"


@dataclass
class Progress:
    """What was counted since the last record of the log, which a checkpoint holds, so that no kill changes a record.

    losses: of every batch, each the mean over all processes. skipped: how many steps were; in_a_row: how many of the
    last steps, whose count goes on over records.
    """

    losses: list[float] = field(default_factory=list)
    skipped: int = 0
    in_a_row: int = 0


def check_names(folder: Path) -> None:
    """Raise FileExistsError where something else than a folder has the name of a checkpoint."""
    for path in folder.glob("step-*"):
        if re.fullmatch(r"step-\d+", path.name) and not path.is_dir():
            raise FileExistsError(f"{path} is no folder, and has the name of a checkpoint: move it away.")


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoints by their steps. Copies that somebody put beside them under other names are none."""
    named = [p for p in folder.glob("step-*") if re.fullmatch(r"step-\d+", p.name) and p.is_dir()]
    return sorted(named, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _tidy(folder: Path, first: int) -> None:
    """Remove what a kill left behind: halves of checkpoints and files, and log records of steps to be taken again."""
    for left in (*folder.glob("step-*.partial"), *folder.glob(".*.part"), *folder.glob("*/.*.part")):  # of images.py
        with contextlib.suppress(OSError):  # Windows removes nothing that somebody has open; it is in nobody's way
            remove(left)
    log = folder / "log.jsonl"
    if log.is_file():
        kept = []
        for line in log.read_bytes().splitlines(keepends=True):
            with contextlib.suppress(ValueError, KeyError, TypeError):  # half a line, or none of a log
                kept += [line] if line.endswith(b"\n") and json.loads(line)["step"] <= first else []
        with writing(log):
            log.with_suffix(".partial").write_bytes(b"".join(kept))
            put_in_place(log.with_suffix(".partial"), log)


def _prune(folder: Path, keep_last: int) -> None:
    """Remove all checkpoints but the last."""
    for old in _checkpoints(folder)[:-keep_last]:
        partial = old.with_suffix(".partial")
        try:
            remove(partial)
            put_in_place(old, partial)  # so that half of it is never taken for a whole one
            remove(partial)
        except OSError as error:  # no run ends by it: somebody may have a file of it open
            tqdm.write(f"{old} could not be removed ({_reason(error)}), and stays until the next checkpoint.")


def remove(path: Path) -> None:
    """Remove a folder with all that is in it, a file, or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold `folder` for one run; ends with the process, however that ends. Raises ValueError where another holds it.

    Folders that were not there are made, and removed again if nothing was written.
    """
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    held = folder / ".lock"
    lock = FileLock(held)
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(
                f"Another run is writing into {folder}: wait for its end, or name another folder."
            ) from error
        except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
            with contextlib.suppress(OSError):
                held.unlink(missing_ok=True)
            raise OSError(f"{folder} cannot be written ({_reason(error)}): name another folder.") from error
        try:
            yield
        finally:
            try:
                held.unlink(missing_ok=True)  # while it is held, or it might be the next run's
                lock.release()
            except OSError:  # Windows removes no file that is open, so there it is never the next run's
                lock.release()
                with contextlib.suppress(OSError):
                    held.unlink(missing_ok=True)
    finally:
        for place in missing:
            with contextlib.suppress(OSError):  # it is not empty
                place.rmdir()


IN_THE_WAY = {errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY}


def not_written(path: Path, error: Exception) -> OSError:
    """What went wrong while `path` was written, as one sentence with what to do about it."""
    if (number := error_number(error)) in FULL:
        advice = "free some space"
    elif number in IN_THE_WAY:
        advice = "move what has its name away"
    else:
        advice = "see that its folder is writable and that nothing has it open"
    return OSError(f"{path} could not be written ({_reason(error)}): {advice} and resume; older checkpoints are whole.")


def _reason(error: Exception) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error).split())[:200].rstrip(".") or type(error).__name__


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """What goes wrong while `path` is written, as one sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise not_written(path, error) from error


def _save(
    folder: Path,
    step: int,
    module: nn.Module,
    average: nn.Module,
    optimisers: Sequence[torch.optim.Optimizer],
    keep_last: int,
    progress: Progress,
) -> None:
    whole = folder / f"step-{step:07d}"
    partial = whole.with_suffix(".partial")
    state = {
        f"{i}.{index}.{name}": tensor
        for i, optimiser in enumerate(optimisers)
        for index, entry in optimiser.state_dict()["state"].items()
        for name, tensor in entry.items()
    }
    try:
        check_names(folder)
        with writing(whole):
            remove(partial)  # of a kill
            partial.mkdir()
            for name, tensors in zip(TENSORS, (module.state_dict(), average.state_dict(), state), strict=True):
                save_file(_own(tensors), partial / name)
            (partial / PROGRESS_FILE).write_bytes(json.dumps(asdict(progress)).encode())
            sums = [f"{_sha256(partial / name)}  {name}\n" for name in (*TENSORS, PROGRESS_FILE)]
            (partial / SUMS_FILE).write_bytes("".join(sums).encode())
            follow_folder(partial)
            for path in (*partial.iterdir(), partial):
                _sync(path)
            remove(whole)
            put_in_place(partial, whole)
            _sync(folder)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _prune(folder, keep_last)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Have a file, or what a folder says is in it, on the disk. Windows opens no folder, and some file systems know
    nothing of the kind; there the files are synced, which is what loses a checkpoint."""
    if not path.is_dir():
        with path.open("r+b") as file:  # for writing, or Windows refuses
            return os.fsync(file.fileno())
    with contextlib.suppress(OSError):
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


@contextlib.contextmanager
def _reading(checkpoint: Path) -> Iterator[None]:
    """What is wrong with a checkpoint, as one sentence."""
    try:
        yield
    except PermissionError as error:
        raise OSError(
            f"The checkpoint {checkpoint} cannot be read ({_reason(error)}): make its files readable."
        ) from error
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:  # RuntimeError: other names or shapes
        raise OSError(
            f"The checkpoint {checkpoint} cannot be continued ({_reason(error)}): delete it, and the run continues "
            "from the one before."
        ) from error


def _verify(checkpoint: Path) -> bool:
    """Whether the files of a checkpoint are proven to be what was written; False for one of before there were sums.

    Raises ValueError where one is another.
    """
    for name in TENSORS:
        if not (checkpoint / name).is_file():
            raise ValueError(f"{name} is missing")
    if not (checkpoint / SUMS_FILE).exists():
        return False
    lines = (checkpoint / SUMS_FILE).read_bytes().decode("ascii", "replace").splitlines()
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    for name in (*TENSORS, PROGRESS_FILE):
        if name not in sums:
            raise ValueError(f"{SUMS_FILE} has no {name}")
        if not (checkpoint / name).is_file():
            raise ValueError(f"{name} is missing")
        if _sha256(checkpoint / name) != sums[name]:
            raise ValueError(f"{name} or its sum in {SUMS_FILE} is damaged")
    return True


def _load(module: nn.Module, file: Path) -> None:
    """Load tensors of just the names, shapes and types of `module`; torch itself would cast them."""
    tensors = load_file(file)
    for name, tensor in module.state_dict().items():
        if name in tensors and tensors[name].dtype != tensor.dtype:
            raise ValueError(f"{name} in {file.name} is {tensors[name].dtype} and not {tensor.dtype}")
    module.load_state_dict(tensors)


STATE = {"AdamW": {"step", "exp_avg", "exp_avg_sq"}, "Muon": {"momentum_buffer"}}
"""What each kind of optimiser remembers of a parameter that had a gradient: a count, or a tensor of its shape."""


def _load_states(optimisers: Sequence[torch.optim.Optimizer], file: Path) -> None:
    """Load the optimisers' states. Raises ValueError for other names, shapes and types than they have."""
    states: list[dict[int, dict[str, torch.Tensor]]] = [{} for _ in optimisers]
    for key, tensor in load_file(file).items():
        found = re.fullmatch(r"(\d+)\.(\d+)\.(\w+)", key)
        which, index = (int(found[1]), int(found[2])) if found else (len(optimisers), 0)
        parameters = [] if which >= len(optimisers) else _parameters(optimisers[which])
        if found is None or index >= len(parameters):
            raise ValueError(f"{file.name} has {key}, of which the optimisers know nothing")
        model = parameters[index].new_empty((), dtype=torch.float32) if found[3] == "step" else parameters[index]
        if (tensor.shape, tensor.dtype) != (model.shape, model.dtype):
            raise ValueError(
                f"{key} in {file.name} is {tensor.dtype} of shape {tuple(tensor.shape)} and not {model.dtype} of "
                f"{tuple(model.shape)}"
            )
        # A copy, for torch keeps the tensor itself: as long as it is mapped, Windows removes no checkpoint
        states[which].setdefault(index, {})[found[3]] = tensor.clone()
    for i, (optimiser, state) in enumerate(zip(optimisers, states, strict=True)):
        for index, entry in state.items():
            wanted = STATE.get(type(optimiser).__name__, entry.keys())
            if entry.keys() != wanted:
                names = ", ".join(sorted(entry.keys() ^ wanted))
                raise ValueError(f"{file.name} has other names than {type(optimiser).__name__} at {i}.{index}: {names}")
        optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})


def _parameters(optimiser: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimiser.param_groups for parameter in group["params"]]


def _check_complete(folder: Path, step: int, optimisers: Sequence[torch.optim.Optimizer]) -> None:
    """Raise OSError where a parameter has a gradient now, and its optimiser forgot it: sums would have told."""
    for optimiser in optimisers:
        lost = [p for p in _parameters(optimiser) if p.grad is not None and not optimiser.state.get(p)]
        if lost:
            with _reading(folder / f"step-{step:07d}"):
                raise ValueError(
                    f"{TENSORS[2]} lacks the state of {len(lost)} of {len(_parameters(optimiser))} parameters"
                )


def _resume(
    folder: Path, module: nn.Module, average: nn.Module, optimisers: Sequence[torch.optim.Optimizer]
) -> tuple[int, Progress, bool]:
    """Load the newest checkpoint: the number of steps that it has seen (0 without one), what was counted for the log,
    and whether it is known to hold all that the optimisers remember."""
    checkpoints = _checkpoints(folder)
    if not checkpoints:
        return 0, Progress(), True
    newest = checkpoints[-1]
    with _reading(newest):
        proven = _verify(newest)
        _load(module, newest / TENSORS[0])
        if average is not module:
            _load(average, newest / TENSORS[1])
        _load_states(optimisers, newest / TENSORS[2])
        progress = Progress()
        if (newest / PROGRESS_FILE).exists():
            try:
                progress = Progress(**json.loads((newest / PROGRESS_FILE).read_bytes()))
            except TypeError as error:
                raise ValueError(f"{PROGRESS_FILE} is no record of progress") from error
        if not proven and _step(newest) and not any(optimiser.state for optimiser in optimisers):
            raise ValueError(f"{TENSORS[2]} is empty")
    return _step(newest), progress, proven or not _step(newest)


def start_from(module: nn.Module, folder: Path) -> None:
    """Write the weights of `module` as the checkpoint of step 0, from which `train` goes on with fresh optimisers."""
    folder.mkdir(parents=True, exist_ok=True)
    _save(folder, 0, module, module, (), keep_last=1, progress=Progress())


def load_average(folder: Path, module: nn.Module) -> int:
    """Load the averaged weights of the newest checkpoint in `folder` into `module` and return its step.

    Raises FileNotFoundError without one, and OSError for one that is damaged or of another module.
    """
    checkpoints = _checkpoints(folder)
    if not checkpoints:
        raise FileNotFoundError(f"{folder} holds no checkpoint: run the step of the recipe that writes it first")
    with _reading(checkpoints[-1]):
        _verify(checkpoints[-1])
        _load(module, checkpoints[-1] / TENSORS[1])
    return _step(checkpoints[-1])
