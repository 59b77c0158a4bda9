"""Compiled transformer blocks: what lies between their matrix products, as few kernels.

Norms, rotations, gates and a LoRA's sums are done one by one without it, each with a pass over memory.
"""

import contextlib
import operator
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import fx, nn
from torch.nn.functional import scaled_dot_product_attention

from .attention import needs_gradient, taken


@contextlib.contextmanager
def compiled_blocks(transformer: nn.Module) -> Iterator[None]:
    """Within, the transformer's blocks run compiled wherever it is in training mode, for all numbers of tokens.

    Each kind of block is compiled when it first runs, once with gradients and once without. In evaluation mode blocks
    run as they are, and so do those of a copy of the transformer, on its own weights. Attention is compiled as
    `MatmulAttention` has it, which is not to be active around it. Raises ValueError where no compiler is installed.
    """
    _check_compiler(next(transformer.parameters()).device)
    kinds: Any = transformer._repeated_blocks  # as diffusers declares them, for its own `compile_repeated_blocks`
    blocks = [block for block in transformer.modules() if type(block).__name__ in kinds]
    forwards = {kind: _training_forward(kind) for kind in {type(block) for block in blocks}}
    for block in blocks:
        block.forward = MethodType(forwards[type(block)], block)  # a method, which a copy has of its own
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _training_forward(kind: type[nn.Module]) -> Callable:
    compiled = torch.compile(kind.forward, dynamic=True, backend=_compile)

    def forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return (compiled if block.training else kind.forward)(block, *args, **kwargs)

    return forward


def _compile(module: fx.GraphModule, inputs: list) -> Callable:
    """What `torch.compile` does by itself, after attention is replaced where `attend` takes it."""
    for node in module.graph.find_nodes(op="call_function", target=scaled_dot_product_attention):
        values = fx.node.map_arg((node.args, node.kwargs), lambda given: given.meta["example_value"])
        tensors = taken(*values)
        if tensors is None:
            continue
        names = ("query", "key", "value")
        given = (*node.args, *(node.kwargs[name] for name in names[len(node.args) :]))
        with module.graph.inserting_before(node):
            keep = needs_gradient(*tensors)
            apart = [module.graph.call_method("contiguous", (operand,)) for operand in given]
            attended = module.graph.call_function(torch.ops.sparse_context.attend.default, (*apart, keep))
            node.replace_all_uses_with(module.graph.call_function(operator.getitem, (attended, 0)))
        module.graph.erase_node(node)
    module.recompile()
    return torch._dynamo.lookup_backend("inductor")(module, inputs)


def _check_compiler(device: torch.device) -> None:
    """Raise ValueError where blocks on this device cannot be compiled."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError) as error:
        raise ValueError(
            "compile needs a C++ compiler, and none was found: install one, such as g++, or leave compile out."
        ) from error
