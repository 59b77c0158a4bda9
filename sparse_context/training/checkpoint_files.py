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
from .sharding import parted_as, whole

TENSORS = ("weights.safetensors", "average.safetensors", "optimiser.safetensors")

PROGRESS_FILE = "progress.json"

SUMS_FILE = "SHA256SUMS"


@dataclass
class Progress:
    """What was counted since the last record of the log, which a checkpoint holds, so that no kill changes a record.

    losses: of every step, each the mean over its batches and all processes. skipped: how many steps were; in_a_row: how
    many of the last steps, whose count goes on over records.
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
    """Write the files of a checkpoint into an empty `folder`, and have them on the disk.

    Of sharded weights one process writes, while the others `gather`.
    """
    for name, tensors in zip(TENSORS, _contents(module, average, optimisers), strict=True):
        save_file(_apart(tensors), folder / name)
    (folder / PROGRESS_FILE).write_bytes(json.dumps(asdict(progress)).encode())
    sums = [f"{_sha256(folder / name)}  {name}\n" for name in (*TENSORS, PROGRESS_FILE)]
    (folder / SUMS_FILE).write_bytes("".join(sums).encode())
    follow_folder(folder)
    for path in (*folder.iterdir(), folder):
        sync(path)


def gather(module: nn.Module, average: nn.Module, optimisers: Sequence[torch.optim.Optimizer]) -> None:
    """What processes with parts of the weights do while one of them writes a checkpoint: hand theirs over."""
    for tensors in _contents(module, average, optimisers):
        for tensor in tensors.values():
            whole(tensor)


def _contents(
    module: nn.Module, average: nn.Module, optimisers: Sequence[torch.optim.Optimizer]
) -> Iterator[dict[str, torch.Tensor]]:
    """What each file of a checkpoint holds, in an order that is the same in all processes."""
    yield module.state_dict()
    yield average.state_dict()
    yield {
        f"{i}.{index}.{name}": torch.as_tensor(value)
        for i, optimiser in enumerate(optimisers)
        for index, parameter in enumerate(parameters_of(optimiser))
        for name, value in optimiser.state.get(parameter, {}).items()
    }


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
    """Load tensors of just the names, shapes and types of `module`; torch itself would cast them. Where that holds
    parts, it gets its parts of them."""
    tensors = load_file(file)
    for name, tensor in module.state_dict().items():
        if name in tensors and tensors[name].dtype != tensor.dtype:
            raise ValueError(f"{name} in {file.name} is {tensors[name].dtype} and not {tensor.dtype}")
        if name in tensors and tensors[name].shape == tensor.shape:  # of another one torch says so
            tensors[name] = parted_as(tensors[name], tensor)
    module.load_state_dict(tensors)


Layout = dict[str, tuple[torch.Size, torch.dtype]]

BLOCK = 256  # values that share a scale in bitsandbytes' 8 bits, and entries of its tables


def layout_of(optimiser: torch.optim.Optimizer, parameter: torch.Tensor) -> Layout | None:
    """Shape and type of what an optimiser remembers of a parameter that had a gradient; None for one not known here.

    bitsandbytes counts its steps in an int, which a checkpoint holds as a tensor.
    """
    same, scalar = (parameter.shape, parameter.dtype), torch.Size()
    kind = type(optimiser).__name__
    if kind == "AdamW":
        return {"step": (scalar, torch.float32), "exp_avg": same, "exp_avg_sq": same}
    if kind == "Muon":
        return {"momentum_buffer": same}
    if kind != "AdamW8bit":
        return None
    narrow = parameter.numel() >= optimiser.args.min_8bit_size  # type: ignore[attr-defined]
    moment = (parameter.shape, torch.uint8 if narrow else torch.float32)
    layout: Layout = {"step": (scalar, torch.int64), "state1": moment, "state2": moment}
    if narrow:
        blocks = torch.Size([-(-parameter.numel() // BLOCK)])
        layout |= {name: (torch.Size([BLOCK]), torch.float32) for name in ("qmap1", "qmap2")}
        layout |= {name: (blocks, torch.float32) for name in ("absmax1", "absmax2")}
    return layout


def load_states(optimisers: Sequence[torch.optim.Optimizer], file: Path) -> None:
    """Load the optimisers' states. Raises ValueError for other names, shapes and types than they have."""
    states: list[dict[int, dict[str, torch.Tensor | int]]] = [{} for _ in optimisers]
    for key, tensor in load_file(file).items():
        found = re.fullmatch(r"(\d+)\.(\d+)\.(\w+)", key)
        which, index = (int(found[1]), int(found[2])) if found else (len(optimisers), 0)
        parameters = [] if which >= len(optimisers) else parameters_of(optimisers[which])
        if found is None or index >= len(parameters):
            raise ValueError(f"{file.name} has {key}, of which the optimisers know nothing")
        parameter = parameters[index]
        layout = layout_of(optimisers[which], parameter) or {}
        shape, dtype = layout.get(found[3], (parameter.shape, parameter.dtype))
        if (tensor.shape, tensor.dtype) != (shape, dtype):
            raise ValueError(
                f"{key} in {file.name} is {tensor.dtype} of shape {tuple(tensor.shape)} and not {dtype} of "
                f"{tuple(shape)}"
            )
        # A copy, for torch keeps the tensor itself: as long as it is mapped, Windows removes no checkpoint
        is_count = shape == () and dtype == torch.int64
        value = int(tensor) if is_count else tensor.clone()
        if isinstance(value, torch.Tensor) and found[3] != "step":
            value = parted_as(value, parameter)
        states[which].setdefault(index, {})[found[3]] = value
    for i, (optimiser, state) in enumerate(zip(optimisers, states, strict=True)):
        parameters = parameters_of(optimiser)
        for index, entry in state.items():
            wanted = (layout_of(optimiser, parameters[index]) or entry).keys()
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
    """Contiguous copies: safetensors refuses tensors that share memory, as tied embeddings do. Parts come together, and
    each goes to the CPU at once, for no device need hold all of them."""
    return {
        name: tensor.detach().clone().contiguous() if (gathered := whole(tensor)) is tensor else gathered.detach().cpu()
        for name, tensor in tensors.items()
    }
