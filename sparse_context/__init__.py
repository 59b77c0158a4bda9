"""Sparse Context: reference-conditioned image generation with a fraction of the reference tokens.

The names below are loaded when they are first used, so that `import sparse_context` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .budget import choose_tokens as choose_tokens
    from .cache import ReferenceCache as ReferenceCache
    from .config import SparseContextConfig as SparseContextConfig
    from .preview import draw_kept as draw_kept
    from .selection import Kept as Kept
    from .selection import Selection as Selection
    from .selection import select_tokens as select_tokens
    from .selectors.masks import mask as mask
    from .selectors.registry import SELECTORS as SELECTORS
    from .selectors.registry import blend as blend
    from .sparsify import apply_sparse_context as apply_sparse_context
    from .sparsify import last_selection as last_selection
    from .sparsify import remove_sparse_context as remove_sparse_context
    from .tokens import ReferenceTokens as ReferenceTokens

__version__ = "0.1.0"

_HOME = {
    "apply_sparse_context": "sparsify",
    "remove_sparse_context": "sparsify",
    "last_selection": "sparsify",
    "SparseContextConfig": "selection",
    "Selection": "selection",
    "Kept": "selection",
    "select_tokens": "selection",
    "SELECTORS": "selectors",
    "blend": "selectors",
    "mask": "selectors",
    "choose_tokens": "budget",
    "ReferenceTokens": "tokens",
    "draw_kept": "preview",
    "ReferenceCache": "cache",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'sparse_context' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
