"""Attention by plain matrix products where that is faster: bfloat16 on a CPU.

PyTorch's fused kernel takes half of a training step there, far slower than the matrix products beside it. One sample at
a time through products and a softmax stays in the processor's cache. The price is memory: the attention weights,
`2 * heads * tokens ** 2` bytes a sample and layer, are kept for the backward pass; without gradients only those of one
sample are held. What would take more than `LARGEST` stays with the fused kernel.

`attend` is an operator of its own (`torch.library`), so that compiled code calls it as it is.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

LARGEST = 2**27  # bytes of the attention weights of one layer, of all samples that are held


class MatmulAttention(TorchFunctionMode):
    """Within `with MatmulAttention():`, unmasked attention of bfloat16 on the CPU takes plain matrix products.

    Everything else (masks, dropout, other types and devices) goes where it went before. Not together with gradient
    checkpointing, whose second forward runs outside of the block, nor around compiled code (compiled.py).
    """

    def __torch_function__(self, func: Callable, types: Iterable[type], args: Any = (), kwargs: Mapping | None = None):
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention and (given := taken(args, kwargs)) is not None:
            return attend(*given)
        return func(*args, **kwargs)


def taken(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor] | None:
    """Queries, keys and values of a call of `scaled_dot_product_attention`; None where `attend` does not take them."""
    names = ("query", "key", "value")
    given = [*args, *(kwargs[name] for name in names[len(args) :] if name in kwargs)]
    others = [value for name, value in kwargs.items() if name not in names]  # a mask, dropout ...
    takes = (
        len(given) == 3
        and all(t.dtype == torch.bfloat16 and t.device.type == "cpu" and t.ndim == 4 for t in given)
        and given[0].shape[:2] == given[1].shape[:2]
        and _held(*given) <= LARGEST
        and not any(isinstance(value, torch.Tensor) or value for value in others)
    )
    return given if takes else None


def _held(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> int:
    """Bytes of the attention weights that a call holds."""
    samples = query.shape[0] if needs_gradient(query, key, value) else 1
    return 2 * samples * query.shape[1] * query.shape[2] * key.shape[2]


def needs_gradient(*tensors: torch.Tensor) -> bool:
    """Whether a call with these is to be differentiated."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v over (batch, heads, tokens, d), by matrix products, one sample after the other."""
    given = [tensor.contiguous() for tensor in (query, key, value)]
    return _attend(*given, needs_gradient(*given))[0]


@torch.library.custom_op("sparse_context::attend", mutates_args=())
def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, keep: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `attend` gives, and the attention weights: of all samples where they are to be kept, else of the last.

    query, key, value: contiguous.
    """
    scale = query.shape[-1] ** -0.5
    out, weights = _room(query, key, value, keep)
    for sample, (q, k, v, o) in enumerate(zip(query, key, value, out, strict=True)):
        w = weights[sample if keep else 0]
        torch.bmm(q * scale, k.transpose(1, 2), out=w)
        torch.softmax(w, -1, out=w)
        torch.bmm(w, v, out=o)
    return out, weights


@_attend.register_fake
def _room(query, key, value, keep):
    out = query.new_empty(query.shape)
    return out, query.new_empty(query.shape[0] if keep else 1, *query.shape[1:3], key.shape[2])


@torch.library.custom_op("sparse_context::attend_backward", mutates_args=())
def _attend_backward(
    gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of queries, keys and values, from that of what `attend` gave and its attention weights."""
    scale = query.shape[-1] ** -0.5
    of_query, of_key, of_value = (torch.empty_like(tensor) for tensor in (query, key, value))
    samples = zip(gradient.contiguous(), query, key, value, weights, of_query, of_key, of_value, strict=True)
    for g, q, k, v, w, to_q, to_k, to_v in samples:
        torch.bmm(w.transpose(1, 2), g, out=to_v)
        scores = torch._softmax_backward_data(torch.bmm(g, v.transpose(1, 2)), w, -1, w.dtype)
        torch.bmm(scores, k, out=to_q).mul_(scale)
        torch.bmm(scores.transpose(1, 2), q, out=to_k).mul_(scale)
    return of_query, of_key, of_value


@_attend_backward.register_fake
def _like_the_inputs(gradient, query, key, value, weights):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (query, key, value))


def _keep_for_backward(ctx: Any, inputs: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *given, keep = inputs
    weights = output[1]
    if keep:
        ctx.save_for_backward(*given, weights)
    ctx.mark_non_differentiable(weights)


def _backward(ctx: Any, gradient: torch.Tensor, _: None) -> tuple[torch.Tensor | None, ...]:
    return *_attend_backward(gradient, *ctx.saved_tensors), None


_attend.register_autograd(_backward, setup_context=_keep_for_backward)
