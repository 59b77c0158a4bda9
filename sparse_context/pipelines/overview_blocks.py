"""The embedded model's weights for overviews: blocks that are added to it, and those behind them.

To read an overview takes more attention heads than the embedded model has, so its weights for overviews bring blocks of
their own. What follows these was trained with them. Both lie in a file beside the model, whole, and whoever asks for no
overview has the model without them.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

SINGLE = 8  # single blocks of the embedded model before any are added
NEW = 4  # blocks that are added
FIRST = 4  # single block before which they come


def grown(base: Any) -> Any:
    """A copy of the transformer with `NEW` single blocks before block `FIRST`, which add nothing yet; of one that has
    them already, a mere copy."""
    if base.config.num_single_layers > SINGLE:
        return copy.deepcopy(base)
    config = dict(base.config) | {"num_single_layers": base.config.num_single_layers + NEW}
    student = type(base).from_config(config)
    state = {}
    for name, tensor in base.state_dict().items():
        head, _, rest = name.partition("single_transformer_blocks.")
        if rest and not head:
            number, _, part = rest.partition(".")
            moved = int(number) + NEW * (int(number) >= FIRST)
            name = f"single_transformer_blocks.{moved}.{part}"
        state[name] = tensor
    for number in range(FIRST, FIRST + NEW):
        block = student.single_transformer_blocks[number]
        nn.init.zeros_(block.attn.to_out.weight)
        state |= {f"single_transformer_blocks.{number}.{name}": t for name, t in block.state_dict().items()}
    student.load_state_dict(state)
    return student


def is_learnt(name: str) -> bool:
    """Whether a parameter belongs to a new block, or to one behind these."""
    head, _, rest = name.partition("single_transformer_blocks.")
    return not head and bool(rest) and int(rest.partition(".")[0]) >= FIRST


@torch.no_grad()
def load_blocks(student: Any, path: Path) -> None:
    """Take the new blocks of a file, and those behind them, into `student`, which is `grown`. Raises ValueError for a
    file that cannot be read, or holds less or other than that."""
    state = student.state_dict()
    try:
        tensors = load_file(path)
        for name, tensor in tensors.items():
            state[name].copy_(tensor.to(state[name].dtype))
        if missing := [name for name in state if is_learnt(name) and name not in tensors]:
            raise KeyError(f"{missing[0]} is missing")
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} cannot be read ({reason}): install sparse-context again.") from error


def with_overviews(transformer: Any, path: Path) -> Any:
    """The embedded model's transformer with its LoRA folded in -> the one that knows overviews, in the same dtype and
    on the same device."""
    place = next(transformer.parameters())
    with torch.random.fork_rng(devices=[]):  # new modules are drawn before their weights are known
        student = grown(transformer)
    nn.Module.to(student, place.device, place.dtype).eval()  # diffusers' own warns of each change of the dtype
    load_blocks(student, path)
    return student
