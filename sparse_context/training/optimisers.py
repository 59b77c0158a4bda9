"""Muon on the matrices inside the blocks, AdamW on the rest."""

import contextlib
import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

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


def make_adamw(
    parameters: Iterable[torch.Tensor], lr: float, weight_decay: float, eight_bit: bool = False, **settings: Any
) -> torch.optim.Optimizer:
    """AdamW; with `eight_bit` that of bitsandbytes, which stores its two moments in 8 bits.

    Tensors under 4,096 elements keep them in float32. Raises ValueError where bitsandbytes is not installed.
    """
    if not eight_bit:
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, **settings)
    check_8bit_adam()
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, lr=lr, weight_decay=weight_decay, **settings)


def check_8bit_adam() -> None:
    """Raise ValueError where bitsandbytes is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            "use_8bit_adam is True, which needs bitsandbytes: pip install 'sparse-context[quantization]', or leave it "
            "out."
        )


def make_optimisers(
    module: nn.Module,
    matrices: Sequence[str],
    lr: float,
    muon_lr: float,
    weight_decay: float = 0.0,
    eight_bit: bool = False,
) -> list[torch.optim.Optimizer]:
    """Muon, with its usual decay of 0.01, on the matrices inside the children named by `matrices`; on everything else
    AdamW with `weight_decay`, and with `eight_bit` as `make_adamw` has it."""
    inside = [
        p for n, p in module.named_parameters() if p.requires_grad and p.ndim == 2 and n.startswith(tuple(matrices))
    ]
    chosen = {id(p) for p in inside}
    rest = [p for p in module.parameters() if p.requires_grad and id(p) not in chosen]
    optimisers: list[torch.optim.Optimizer] = []
    if rest:  # a LoRA may lie inside the blocks as a whole
        optimisers.append(make_adamw(rest, lr, weight_decay, eight_bit, betas=(0.9, 0.98)))
    if inside:
        optimisers.append(Muon(inside, lr=muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
    return optimisers
