"""Modular pipelines: blocks that hand a state on. What their families share."""

from collections.abc import Callable
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from diffusers import ModularPipelineBlocks

if TYPE_CHECKING:
    from ..sparsify import SparseContext


def attach_step(pipe: Any, context: "SparseContext", output: str, keep_essentials: Callable) -> None:
    """Give `pipe` a copy of its blocks that runs `keep_essentials(state)` behind each one that makes `output`."""

    def start_call(state: Any) -> None:
        context.selection = None

    blocks = insert_behind(pipe._blocks, output, _step(pipe, keep_essentials))
    blocks.sub_blocks.insert("start_sparse_context", _step(pipe, start_call), 0)
    context.override(pipe, "_blocks", blocks)


def insert_behind(blocks: Any, output: str, step: Any) -> Any:
    """A copy of `blocks` with `step` behind each block that makes `output`, at any depth.

    A copy, because diffusers' own blocks are shared by all pipelines that are made from one class.
    """
    blocks = deepcopy(blocks)
    _insert_behind(blocks, output, step)
    return blocks


def _insert_behind(blocks: Any, output: str, step: Any) -> None:
    for place, (_, block) in reversed(list(enumerate(blocks.sub_blocks.items()))):
        if block.sub_blocks:
            _insert_behind(block, output, step)
        elif output in block.intermediate_output_names:
            blocks.sub_blocks.insert("keep_essentials", step, place + 1)


def _step(pipe: Any, function: Callable) -> Any:
    """`function(state)` as a block that works in `pipe` alone, wherever its blocks may be copied to."""

    class Step(ModularPipelineBlocks):
        def __call__(self, components, state):
            if components is pipe:
                function(state)
            return components, state

    return Step()
