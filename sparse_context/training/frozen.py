"""Frozen int8 weights without copies: what a backward pass needs of them is unpacked when it comes to them."""

from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


class _Frozen(torch.autograd.Function):
    """A linear layer whose weight has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
        ctx.layer = layer
        return linear(x, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient @ ctx.layer.weight.dequantize().to(gradient.dtype), None


def _forward(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return _Frozen.apply(x, layer)


def unpack_in_backward(transformer: nn.Module) -> None:
    """Let the layers of torchao's weights unpack them anew for the backward pass.

    By itself, autograd keeps an unpacked copy of every weight from the forward on, which together take as much memory
    as the weights did before they were quantised.
    """
    for layer in transformer.modules():
        if isinstance(layer, nn.Linear) and is_traceable_wrapper_subclass(layer.weight):
            layer.forward = MethodType(_forward, layer)
