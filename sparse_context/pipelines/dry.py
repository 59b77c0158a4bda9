"""A dry run: what a module computes and keeps, from the shapes of its inputs alone, on the meta device."""

from collections.abc import Callable
from typing import Any
from weakref import ref

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class DryRun(TorchDispatchMode):
    """Within it, what modules on the meta device do is counted, and nothing is computed.

    flops: a multiply and an add being two; norms and activations are not counted. peak: the most bytes that tensors
    took at once which were made within, as an allocator of a device would count them. Attention is one that keeps no
    scores (flash), as every accelerator has it. Convolutions of 16-bit values take a copy of what goes in and of what
    comes out, for cuDNN computes them in another order. What other kernels take for themselves is not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.peak = self._held = 0
        self._storages: dict[int, ref] = {}
        self._attention = self.attention()

    def __enter__(self) -> "DryRun":
        super().__enter__()
        self._attention.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._attention.__exit__(*error)
        super().__exit__(*error)

    def attention(self) -> TorchFunctionMode:
        """What counts attention, which is also within this object's own block. Where gradient checkpointing computes
        again, in the backward, torch leaves all modes of this kind, and they are to be entered anew."""
        return _FlashAttention(self)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = _tensors((args, kwargs))
        for tensor in given:  # weights, and what else was there before
            self._hold(tensor, 0)
        made = function(*args, **(kwargs or {}))
        count = flop_registry.get(function._overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=made)
        for tensor in _tensors(made):
            self._hold(tensor, tensor.untyped_storage().nbytes())
            if function._overloadpacket is torch.ops.aten.convolution and tensor.itemsize == 2:
                self.peak = max(self.peak, self._held + given[0].nbytes + tensor.nbytes)
        return made

    def _hold(self, tensor: torch.Tensor, size: int) -> None:
        """Count a tensor's storage, which takes `size` bytes, until nothing has it any more."""
        storage = tensor.untyped_storage()
        key = id(storage)
        known = self._storages.get(key)
        if known is not None and known() is storage:
            return

        def let_go(dead: ref) -> None:
            self._held -= size
            if self._storages.get(key) is dead:
                del self._storages[key]

        self._storages[key] = ref(storage, let_go)
        self._held += size
        self.peak = max(self.peak, self._held)


def _tensors(values: Any) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


class _FlashAttention(TorchFunctionMode):
    """Attention as one kernel: the meta device has none, and would take the way that keeps all scores."""

    def __init__(self, run: DryRun) -> None:
        super().__init__()
        self.run = run

    def __torch_function__(self, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not torch.nn.functional.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        query, key, value = args[:3] if len(args) >= 3 else ((kwargs or {})[name] for name in ("query", "key", "value"))
        return _Flash.apply(query, key, value, self.run)


class _Flash(torch.autograd.Function):
    """What the kernel takes, forward and backward: it computes the scores again, and keeps what theirs add up to."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, run: DryRun) -> torch.Tensor:
        *batch, heads, length, depth = query.shape
        ctx.flops = 2 * query[..., 0].numel() * key.shape[-2] * (depth + value.shape[-1])
        run.flops += ctx.flops
        made = query.new_empty(*batch, length, heads, value.shape[-1]).transpose(-2, -3)
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.run = run
        ctx.save_for_backward(query, key, value, made, sums)
        return made

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.run.flops += 5 * ctx.flops // 2  # five products, where the forward has two
        return *(torch.empty_like(given) for given in ctx.saved_tensors[:3]), None
