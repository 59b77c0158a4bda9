"""Sparse Context for ComfyUI: nodes that let a model look at few reference tokens, those that matter.

ComfyUI loads this folder from `custom_nodes`. Nothing of ComfyUI is imported until it asks for the nodes, so that the
parts below them can be tested without it.
"""

from typing import Any

WEB_DIRECTORY = "./web"  # the nodes' help pages


async def comfy_entrypoint() -> Any:
    from .nodes import SparseContextExtension

    return SparseContextExtension()
