"""Attention by plain matrix products where that is faster: bfloat16 on a CPU, with gradients.

PyTorch's fused kernel takes half of a training step there, far slower than the matrix products beside it. One sample at
a time through products and a softmax stays in the processor's cache. The price is memory: the attention weights,
`2 * heads * tokens ** 2` bytes a sample and layer, are kept for the backward pass. So what would take more than
`LARGEST` stays with the fused kernel.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

LARGEST = 2**27  # bytes of the attention weights of one layer, of all samples


class MatmulAttention(TorchFunctionMode):
    """Within `with MatmulAttention():`, unmasked attention of bfloat16 on the CPU takes plain matrix products.

    Everything else (masks, dropout, other types and devices, calls without gradients) goes where it went before. Not
    together with gradient checkpointing, whose second forward runs outside of the block.
    """

    def __torch_function__(self, func: Callable, types: Iterable[type], args: Any = (), kwargs: Mapping | None = None):
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention and torch.is_grad_enabled() and _plain(args, kwargs):
            query, key, value = args if args else (kwargs[name] for name in ("query", "key", "value"))
            return attend(query, key, value)
        return func(*args, **kwargs)


def _plain(args: tuple, kwargs: Mapping) -> bool:
    tensors = args or tuple(kwargs.get(name) for name in ("query", "key", "value"))
    others = [value for name, value in kwargs.items() if name not in ("query", "key", "value")]  # a mask, dropout ...
    return (
        len(tensors) == 3
        and all(t.dtype == torch.bfloat16 and t.device.type == "cpu" and t.ndim == 4 for t in tensors)
        and tensors[0].shape[:2] == tensors[1].shape[:2]
        and 2 * tensors[0].shape[:3].numel() * tensors[1].shape[2] <= LARGEST
        and not any(isinstance(value, torch.Tensor) or value for value in others)
    )


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v over (batch, heads, tokens, d), by matrix products, one sample after the other."""
    return _Attention.apply(query, key, value)


class _Attention(torch.autograd.Function):
    """softmax(q k^T / sqrt(d)) v over (batch, heads, tokens, d), one sample after the other."""

    @staticmethod
    def forward(ctx, query, key, value):
        query, key, value = (tensor.contiguous() for tensor in (query, key, value))
        scale = query.shape[-1] ** -0.5
        weights = query.new_empty(*query.shape[:3], key.shape[2])
        out = torch.empty_like(query)
        for q, k, v, w, o in zip(query, key, value, weights, out, strict=True):
            torch.bmm(q * scale, k.transpose(1, 2), out=w)
            torch.softmax(w, -1, out=w)
            torch.bmm(w, v, out=o)
        ctx.save_for_backward(query, key, value, weights)
        return out

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, weights = ctx.saved_tensors
        scale = query.shape[-1] ** -0.5
        of_query, of_key, of_value = (torch.empty_like(tensor) for tensor in (query, key, value))
        samples = zip(gradient.contiguous(), query, key, value, weights, of_query, of_key, of_value, strict=True)
        for g, q, k, v, w, to_q, to_k, to_v in samples:
            torch.bmm(w.transpose(1, 2), g, out=to_v)
            scores = torch._softmax_backward_data(torch.bmm(g, v.transpose(1, 2)), w, -1, w.dtype)
            torch.bmm(scores, k, out=to_q).mul_(scale)
            torch.bmm(scores.transpose(1, 2), q, out=to_k).mul_(scale)
        return of_query, of_key, of_value
