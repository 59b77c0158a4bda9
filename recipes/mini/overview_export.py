"""What is kept of a run of overviews: the embedded model's file for them, which later runs begin at, too.

It holds the new blocks as eight-bit floats, and what changed in the blocks behind them as a LoRA of the package's own
weights: a seventh of a checkpoint. It is no part of the base and its LoRA, for within the size of these, ranks would be
too small to hold it, and everyone else would have four blocks more to pass through.
"""

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sparse_context.images import put_in_place
from sparse_context.pipelines.embedded import ADAPTERS, OVERVIEW, adapter_record
from sparse_context.pipelines.load import load
from sparse_context.pipelines.overview_blocks import FIRST, NEW, grown, is_new
from sparse_context.pipelines.spec import ModelSpec
from sparse_context.training.checkpoints import load_average
from sparse_context.training.lora import extract_lora, save_lora
from sparse_context.training.run_folder import read_record

from .overview_sets import OverviewConfig

EIGHT_BIT = torch.float8_e4m3fn
RANK = 64  # of what changed behind the new blocks


def save_blocks(student: Any, begun: Any, record: Mapping[str, Any], path: Path) -> None:
    """Write what `student` learned since `begun`, the transformer that the first run began with, whole or not at all.
    record: what the file says of itself."""
    blocks = student.single_transformer_blocks
    behind = {f"single_transformer_blocks.{number}." for number in range(FIRST + NEW, len(blocks))}
    lora = extract_lora(begun, student, lambda name: RANK if name.startswith(tuple(behind)) else 0)
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in lora.items()}
    tensors |= {name: tensor.to(EIGHT_BIT) for name, tensor in student.state_dict().items() if is_new(name)}
    partial = path.with_suffix(".partial")
    save_lora(tensors, partial, {"format": "pt", "sparse_context": json.dumps(dict(record))})
    put_in_place(partial, path)


def export_overview(folder: Path, name: str = "overview", path: Path = OVERVIEW) -> Path:
    """Write the average of the run `folder/name` as the embedded model's weights for overviews; returns the file. Its
    record counts the steps of this run, which began at what the file held before."""
    begun = grown(load(ModelSpec(dtype="float32", device="cpu")).transformer)
    student = copy.deepcopy(begun)
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
    save_blocks(student, begun, record, path)
    return path
