"""The checkpoints of a run: folders that are renamed into place when they are whole."""

import contextlib
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from ..images import put_in_place
from .checkpoint_files import (
    TENSORS,
    Progress,
    load_module,
    load_states,
    parameters_of,
    read_progress,
    reading,
    sync,
    verify,
    write_checkpoint,
)
from .files import reason, writing


class Checkpoints:
    """The checkpoints in the folder of a run: it writes, verifies, loads and prunes them.

    keep_last: how many stay when another is written.
    """

    def __init__(self, folder: Path, keep_last: int = 2) -> None:
        self.folder, self._keep_last = folder, keep_last

    def paths(self) -> list[Path]:
        """Those that are there, by their steps. Copies that somebody put beside them under other names are none."""
        named = [p for p in self.folder.glob("step-*") if re.fullmatch(r"step-\d+", p.name) and p.is_dir()]
        return sorted(named, key=_step)

    def newest_step(self) -> int:
        """The number of steps that the newest one has seen; 0 without one."""
        paths = self.paths()
        return _step(paths[-1]) if paths else 0

    def check_names(self) -> None:
        """Raise FileExistsError where something else than a folder has the name of a checkpoint."""
        for path in self.folder.glob("step-*"):
            if re.fullmatch(r"step-\d+", path.name) and not path.is_dir():
                raise FileExistsError(f"{path} is no folder, and has the name of a checkpoint: move it away.")

    def save(
        self,
        step: int,
        module: nn.Module,
        average: nn.Module,
        optimisers: Sequence[torch.optim.Optimizer],
        progress: Progress,
    ) -> None:
        """Write one, whole or not at all, and remove all but the last. Raises OSError in one sentence."""
        whole = self._path(step)
        partial = whole.with_suffix(".partial")
        try:
            self.check_names()
            with writing(whole):
                remove(partial)  # of a kill
                partial.mkdir()
                write_checkpoint(partial, module, average, optimisers, progress)
                remove(whole)
                put_in_place(partial, whole)
                sync(self.folder)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        self.prune()

    def resume(
        self, module: nn.Module, average: nn.Module, optimisers: Sequence[torch.optim.Optimizer]
    ) -> tuple[int, Progress, bool]:
        """Load the newest: the number of steps that it has seen (0 without one), what was counted for the log, and
        whether it is known to hold all that the optimisers remember. Raises OSError in one sentence."""
        if not self.paths():
            return 0, Progress(), True
        newest = self.paths()[-1]
        with reading(newest):
            proven = verify(newest)
            load_module(module, newest / TENSORS[0])
            if average is not module:
                load_module(average, newest / TENSORS[1])
            load_states(optimisers, newest / TENSORS[2])
            progress = read_progress(newest)
            if not proven and _step(newest) and not any(optimiser.state for optimiser in optimisers):
                raise ValueError(f"{TENSORS[2]} is empty")
        return _step(newest), progress, proven or not _step(newest)

    def load_average(self, module: nn.Module) -> int:
        """Load the averaged weights of the newest into `module` and return its step.

        Raises FileNotFoundError without one, and OSError for one that is damaged or of another module.
        """
        if not self.paths():
            raise FileNotFoundError(
                f"{self.folder} holds no checkpoint: run the step of the recipe that writes it first"
            )
        newest = self.paths()[-1]
        with reading(newest):
            verify(newest)
            load_module(module, newest / TENSORS[1])
        return _step(newest)

    def check_complete(self, step: int, optimisers: Sequence[torch.optim.Optimizer]) -> None:
        """Raise OSError where a parameter has a gradient now, and its optimiser forgot it: sums would have told."""
        for optimiser in optimisers:
            parameters = parameters_of(optimiser)
            lost = [p for p in parameters if p.grad is not None and not optimiser.state.get(p)]
            if lost:
                with reading(self._path(step)):
                    raise ValueError(f"{TENSORS[2]} lacks the state of {len(lost)} of {len(parameters)} parameters")

    def tidy(self, first: int) -> None:
        """Remove what a kill left: halves of checkpoints and files, and log records of steps to be taken again."""
        halves = (*self.folder.glob("step-*.partial"), *self.folder.glob(".*.part"), *self.folder.glob("*/.*.part"))
        for half in halves:  # .part is of images.py
            with contextlib.suppress(OSError):  # Windows removes nothing that somebody has open; it is in nobody's way
                remove(half)
        log = self.folder / "log.jsonl"
        if log.is_file():
            kept = []
            for line in log.read_bytes().splitlines(keepends=True):
                with contextlib.suppress(ValueError, KeyError, TypeError):  # half a line, or none of a log
                    kept += [line] if line.endswith(b"\n") and json.loads(line)["step"] <= first else []
            with writing(log):
                log.with_suffix(".partial").write_bytes(b"".join(kept))
                put_in_place(log.with_suffix(".partial"), log)

    def prune(self) -> None:
        """Remove all but the last."""
        for old in self.paths()[: -self._keep_last]:
            partial = old.with_suffix(".partial")
            try:
                remove(partial)
                put_in_place(old, partial)  # so that half of it is never taken for a whole one
                remove(partial)
            except OSError as error:  # no run ends by it: somebody may have a file of it open
                tqdm.write(f"{old} could not be removed ({reason(error)}), and stays until the next checkpoint.")

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:07d}"


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def newest_step(folder: Path) -> int:
    """The number of steps that the newest checkpoint in `folder` has seen; 0 without one."""
    return Checkpoints(folder).newest_step()


def has_begun(folder: Path) -> bool:
    """Whether `folder` holds a checkpoint, be it of step 0."""
    return bool(Checkpoints(folder).paths())


def start_from(module: nn.Module, folder: Path) -> None:
    """Write the weights of `module` as the checkpoint of step 0, from which `train` goes on with fresh optimisers."""
    folder.mkdir(parents=True, exist_ok=True)
    Checkpoints(folder, keep_last=1).save(0, module, module, (), Progress())


def load_average(folder: Path, module: nn.Module) -> int:
    """`Checkpoints.load_average` of `folder`."""
    return Checkpoints(folder).load_average(module)


def remove(path: Path) -> None:
    """Remove a folder with all that is in it, a file, or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
