"""Where a run of overviews begins: at what earlier runs learned, a small file in the repository that is not shipped.

It holds the new blocks as eight-bit floats, and what changed in the blocks behind them as a LoRA of the package's own
weights: a seventh of a checkpoint. The next steps of a training heal what that loses.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sparse_context.images import put_in_place
from sparse_context.training.lora import extract_lora, save_lora

from .overview_blocks import FIRST, NEW, new_layer

START = Path(__file__).with_name("overview_start.safetensors")
EIGHT_BIT = torch.float8_e4m3fn
RANK = 64  # of what changed behind the new blocks


def save_start(student: Any, begun: Any, steps: int, path: Path = START) -> None:
    """Write what `student` learned since `begun`, the transformer that the first run began with. steps: it took."""
    blocks = student.single_transformer_blocks
    behind = {f"single_transformer_blocks.{number}." for number in range(FIRST + NEW, len(blocks))}
    lora = extract_lora(begun, student, lambda name: RANK if name.startswith(tuple(behind)) else 0)
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in lora.items()}
    tensors |= {name: tensor.to(EIGHT_BIT) for name, tensor in student.state_dict().items() if new_layer(name)}
    partial = path.with_suffix(".partial")
    save_lora(tensors, partial, {"format": "pt", "sparse_context": json.dumps({"steps": steps})})
    put_in_place(partial, path)


@torch.no_grad()
def load_start(student: Any, path: Path = START) -> int:
    """Take what `save_start` wrote into `student`, which is at what the first run began with; returns its steps, or 0
    where there is no file."""
    if not path.is_file():
        return 0
    tensors, state = load_file(path), student.state_dict()
    for name, tensor in tensors.items():
        if ".lora_A." in name:
            layer = name.removeprefix("transformer.").replace(".lora_A.weight", ".weight")
            state[layer] += tensors[name.replace(".lora_A.", ".lora_B.")].float() @ tensor.float()
        elif ".lora_B." not in name:
            state[name].copy_(tensor.to(state[name].dtype))
    with safe_open(path, framework="pt") as file:
        return int(json.loads(file.metadata()["sparse_context"])["steps"])
