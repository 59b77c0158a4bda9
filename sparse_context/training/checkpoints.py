"""Checkpoints: folders of safetensors files with their sums, renamed into place when they are whole."""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from ..images import follow_folder, put_in_place
from .files import _reason, writing

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
