"""The blocks that are added to the embedded model so that it can read overviews."""

import copy
from typing import Any

import torch
from torch import nn

SINGLE = 8  # single blocks of the base before any are added
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


def without_new_blocks(transformer: Any) -> Any:
    """A transformer as it was before `grown`: this one's own modules, but for the new blocks; itself if it has none."""
    blocks = transformer.single_transformer_blocks
    if len(blocks) != SINGLE + NEW:
        return transformer
    short = first_blocks(transformer, SINGLE)
    short.single_transformer_blocks = nn.ModuleList([*blocks[:FIRST], *blocks[FIRST + NEW :]])
    return short


def first_blocks(transformer: Any, count: int) -> Any:
    """A transformer of the first `count` single blocks of this one, which are this one's own modules."""
    with torch.device("meta"):
        short = type(transformer).from_config(dict(transformer.config) | {"num_single_layers": count})
    for name, part in transformer.named_children():
        setattr(short, name, part[:count] if name == "single_transformer_blocks" else part)
    return short.eval()


def new_layer(name: str) -> str:
    """The part of a parameter's name inside a new block; empty for another."""
    head, _, rest = name.partition("single_transformer_blocks.")
    number, _, part = rest.partition(".")
    return part if not head and rest and FIRST <= int(number) < FIRST + NEW else ""
