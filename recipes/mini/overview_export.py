"""What is kept of a run of overviews: the embedded model's file for them, which later runs begin at, too.

It holds the new blocks and those behind them whole, as eight-bit floats: a sixth of a checkpoint. What changed in the
latter has too high a rank for a LoRA of that size, and a later run would begin at what a LoRA had left of it. It is no
part of the base and its LoRA, for everyone else would have four blocks more to pass through.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sparse_context.images import put_in_place
from sparse_context.pipelines.embedded import ADAPTERS, OVERVIEW, adapter_record
from sparse_context.pipelines.load import load
from sparse_context.pipelines.overview_blocks import grown, is_learnt
from sparse_context.pipelines.spec import ModelSpec
from sparse_context.training.checkpoints import load_average
from sparse_context.training.lora import save_lora
from sparse_context.training.run_folder import read_record

from .overview_sets import OverviewConfig

EIGHT_BIT = torch.float8_e4m3fn


def save_blocks(student: Any, record: Mapping[str, Any], path: Path) -> None:
    """Write the blocks of `student` that were trained, matrices as eight-bit floats, whole or not at all. record: what
    the file says of itself."""
    learnt = {name: tensor for name, tensor in student.state_dict().items() if is_learnt(name)}
    tensors = {name: tensor.to(EIGHT_BIT if tensor.ndim > 1 else torch.bfloat16) for name, tensor in learnt.items()}
    partial = path.with_suffix(".partial")
    save_lora(tensors, partial, {"format": "pt", "sparse_context": json.dumps(dict(record))})
    put_in_place(partial, path)


def export_overview(folder: Path, name: str = "overview", path: Path = OVERVIEW) -> Path:
    """Write the average of the run `folder/name` as the embedded model's weights for overviews; returns the file. Its
    record counts the steps of this run, which began at what the file held before."""
    student = grown(load(ModelSpec(dtype="float32", device="cpu")).transformer)
    steps, config = load_average(folder / name, student), asdict(OverviewConfig()) | read_record(folder / name)
    kinds = dict(config["mix"])
    record = {
        "base": "the embedded model",
        "base_weights": adapter_record(ADAPTERS["plain"])["base_weights"],
        "steps": steps,
        "keep": [config["keep"][0], config["keep"][1] + max(factor**-2 for factor in config["factors"])],
        "overview": {
            "factors": list(config["factors"]),
            "layout": "spread",
            "tasks": ["edit", "global"],
            "alone": kinds["alone"],
        },
        "plain": kinds["plain"],
        "subsets": config["subsets"],
        "kv": False,
        "version": adapter_record(ADAPTERS["plain"])["version"],
    }
    save_blocks(student, record, path)
    return path
