"""One checkpoint: a folder of safetensors files with their sums, and how each is written, verified and read."""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..images import follow_folder
from .files import reason

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


def write_checkpoint(
    folder: Path,
    module: nn.Module,
    average: nn.Module,
    optimisers: Sequence[torch.optim.Optimizer],
    progress: Progress,
) -> None:
    """Write the files of a checkpoint into an empty `folder`, and have them on the disk."""
    state = {
        f"{i}.{index}.{name}": tensor
        for i, optimiser in enumerate(optimisers)
        for index, entry in optimiser.state_dict()["state"].items()
        for name, tensor in entry.items()
    }
    for name, tensors in zip(TENSORS, (module.state_dict(), average.state_dict(), state), strict=True):
        save_file(_apart(tensors), folder / name)
    (folder / PROGRESS_FILE).write_bytes(json.dumps(asdict(progress)).encode())
    sums = [f"{_sha256(folder / name)}  {name}\n" for name in (*TENSORS, PROGRESS_FILE)]
    (folder / SUMS_FILE).write_bytes("".join(sums).encode())
    follow_folder(folder)
    for path in (*folder.iterdir(), folder):
        sync(path)


def read_progress(checkpoint: Path) -> Progress:
    """What a checkpoint counted for the log; nothing where it has no such file. Raises ValueError for another's."""
    if not (checkpoint / PROGRESS_FILE).exists():
        return Progress()
    try:
        return Progress(**json.loads((checkpoint / PROGRESS_FILE).read_bytes()))
    except TypeError as error:
        raise ValueError(f"{PROGRESS_FILE} is no record of progress") from error


@contextlib.contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """What is wrong with a checkpoint, as one sentence."""
    try:
        yield
    except PermissionError as error:
        raise OSError(
            f"The checkpoint {checkpoint} cannot be read ({reason(error)}): make its files readable."
        ) from error
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:  # RuntimeError: other names or shapes
        raise OSError(
            f"The checkpoint {checkpoint} cannot be continued ({reason(error)}): delete it, and the run continues "
            "from the one before."
        ) from error


def verify(checkpoint: Path) -> bool:
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


def load_module(module: nn.Module, file: Path) -> None:
    """Load tensors of just the names, shapes and types of `module`; torch itself would cast them."""
    tensors = load_file(file)
    for name, tensor in module.state_dict().items():
        if name in tensors and tensors[name].dtype != tensor.dtype:
            raise ValueError(f"{name} in {file.name} is {tensors[name].dtype} and not {tensor.dtype}")
    module.load_state_dict(tensors)


STATE = {"AdamW": {"step", "exp_avg", "exp_avg_sq"}, "Muon": {"momentum_buffer"}}
"""What each kind of optimiser remembers of a parameter that had a gradient: a count, or a tensor of its shape."""


def load_states(optimisers: Sequence[torch.optim.Optimizer], file: Path) -> None:
    """Load the optimisers' states. Raises ValueError for other names, shapes and types than they have."""
    states: list[dict[int, dict[str, torch.Tensor]]] = [{} for _ in optimisers]
    for key, tensor in load_file(file).items():
        found = re.fullmatch(r"(\d+)\.(\d+)\.(\w+)", key)
        which, index = (int(found[1]), int(found[2])) if found else (len(optimisers), 0)
        parameters = [] if which >= len(optimisers) else parameters_of(optimisers[which])
        if found is None or index >= len(parameters):
            raise ValueError(f"{file.name} has {key}, of which the optimisers know nothing")
        like = parameters[index].new_empty((), dtype=torch.float32) if found[3] == "step" else parameters[index]
        if (tensor.shape, tensor.dtype) != (like.shape, like.dtype):
            raise ValueError(
                f"{key} in {file.name} is {tensor.dtype} of shape {tuple(tensor.shape)} and not {like.dtype} of "
                f"{tuple(like.shape)}"
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


def parameters_of(optimiser: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimiser.param_groups for parameter in group["params"]]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
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


def _apart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous copies: safetensors refuses tensors that share memory, as tied embeddings do."""
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
