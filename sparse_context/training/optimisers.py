"""Muon on the matrices inside the blocks, AdamW on the rest."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from .muon import Muon


@contextlib.contextmanager
def drawn_from(seed: int) -> Iterator[None]:
    """What layers draw from torch's global generator as they are built on the CPU comes from `seed` inside.

    Afterwards that generator is where it was before, for it is the user's.
    """
    with torch.random.fork_rng(devices=()), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        yield


def make_optimisers(
    module: nn.Module, matrices: Sequence[str], lr: float, muon_lr: float, weight_decay: float = 0.0
) -> list[torch.optim.Optimizer]:
    """Muon, with its usual decay of 0.01, on the matrices inside the children named by `matrices`; on everything else
    AdamW with `weight_decay`."""
    inside = [
        p for n, p in module.named_parameters() if p.requires_grad and p.ndim == 2 and n.startswith(tuple(matrices))
    ]
    chosen = {id(p) for p in inside}
    rest = [p for p in module.parameters() if p.requires_grad and id(p) not in chosen]
    optimisers: list[torch.optim.Optimizer] = []
    if rest:  # a LoRA may lie inside the blocks as a whole
        optimisers.append(torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=weight_decay))
    if inside:
        optimisers.append(Muon(inside, lr=muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
    return optimisers
