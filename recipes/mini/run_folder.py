"""The folder of a run of the recipe: its config, and files that are whole or not there."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparse_context.images import put_in_place, save_text
from sparse_context.training.checkpoints import newest_step
from sparse_context.training.precision import has_fast_bfloat16
from sparse_context.training.run_folder import read_record


def default_device() -> torch.device:
    """The accelerator where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(device: torch.device | str) -> torch.autocast:
    """bfloat16 for the products of the `with` block, where `device` has instructions for it."""
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=has_fast_bfloat16(device))


def to_tensor(pictures: list[np.ndarray]) -> torch.Tensor:
    """uint8 (H, W, 3) pictures -> float32 (B, 3, H, W) in [-1, 1]."""
    return to_unit(torch.from_numpy(np.stack(pictures)))


def to_unit(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1]."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


def save_whole(part, folder: Path) -> None:
    """`part.save_pretrained(folder)`, whole or not at all."""
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    part.save_pretrained(partial)
    swap_in(partial, folder)


def swap_in(new: Path, place: Path) -> None:
    """Move a folder or file to `place`. What was there is moved aside at once, where to remove it would take a while
    in which a kill leaves half; a kill in between leaves it under `.old`."""
    old = place.with_suffix(place.suffix + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if place.is_dir():
        put_in_place(place, old)
    put_in_place(new, place)
    shutil.rmtree(old, ignore_errors=True)


def save_config(run: Path, config: Any) -> None:
    """Write what `check_config` reads."""
    run.mkdir(parents=True, exist_ok=True)
    save_text(json.dumps(asdict(config), indent=2), run / "config.json")


def check_config(run: Path, config: Any) -> None:
    """Raise ValueError where the folder `run` holds a run that was begun with another config of this dataclass, or one
    whose config cannot be read."""
    if not newest_step(run):
        return
    begun = read_record(run)
    if "steps" not in begun:
        raise ValueError(f"{run / 'config.json'} is no record of a run: put the run's own back, or move it away.")
    record, own = (json.loads(json.dumps(asdict(each))) for each in (config, type(config)()))
    for name, value in record.items():
        before = begun.get(name, own[name])  # of a run begun before a setting was there
        if before != value:
            raise ValueError(
                f"The run in {run} was begun with {name} {before!r}, not {value!r}: continue it with its own, or move "
                "it away."
            )
