"""Sparse Context: reference-conditioned image generation with a fraction of the reference tokens.

On a pipeline of diffusers:

- `apply_sparse_context`: from the next call on, keep only the reference tokens that matter.
- `remove_sparse_context`: give the pipeline back exactly as it was.
- `last_selection`: what was kept in the pipeline's last call.
- `SparseContextConfig`: what to keep; `keep` is the dial.
- `ReferenceCache`: the latents and scores of references that come again.
- `insert_sparse_context`, `SparseContextStep`: the same as a step of modular blocks, before they become a pipeline.

What matters:

- `SELECTORS`: selectors by name.
- `blend`: a selector that averages others by weight.
- `mask`: a selector from a user's masks.
- `text`: a selector of what a phrase names.
- `matting`: a selector of what a model of the user's own cuts out.

Without a pipeline:

- `select_tokens`: from pictures and token grids to the tokens that are kept.
- `Selection`, `Kept`: what was kept in one call, and of one reference.
- `choose_tokens`: from scores to the tokens that are kept.
- `ReferenceTokens`: latents and position ids, which are cut together.
- `draw_kept`: a reference with its dropped tokens faded.

The names are loaded when they are first used, so that `import sparse_context` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .budget import choose_tokens as choose_tokens
    from .cache import ReferenceCache as ReferenceCache
    from .config import SparseContextConfig as SparseContextConfig
    from .families.flux2.modular import SparseContextStep as SparseContextStep
    from .families.flux2.modular import insert_sparse_context as insert_sparse_context
    from .preview import draw_kept as draw_kept
    from .selection import Kept as Kept
    from .selection import Selection as Selection
    from .selection import select_tokens as select_tokens
    from .selectors.masks import mask as mask
    from .selectors.matting import matting as matting
    from .selectors.registry import SELECTORS as SELECTORS
    from .selectors.registry import blend as blend
    from .selectors.text import text as text
    from .sparsify import apply_sparse_context as apply_sparse_context
    from .sparsify import last_selection as last_selection
    from .sparsify import remove_sparse_context as remove_sparse_context
    from .tokens import ReferenceTokens as ReferenceTokens

__version__ = "0.1.0"

_HOME = {
    "apply_sparse_context": "sparsify",
    "remove_sparse_context": "sparsify",
    "last_selection": "sparsify",
    "SparseContextConfig": "config",
    "ReferenceCache": "cache",
    "insert_sparse_context": "families.flux2.modular",
    "SparseContextStep": "families.flux2.modular",
    "SELECTORS": "selectors.registry",
    "blend": "selectors.registry",
    "mask": "selectors.masks",
    "text": "selectors.text",
    "matting": "selectors.matting",
    "select_tokens": "selection",
    "Selection": "selection",
    "Kept": "selection",
    "choose_tokens": "budget",
    "ReferenceTokens": "tokens",
    "draw_kept": "preview",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'sparse_context' has no attribute {name!r}")
    from .layers import explain_missing_packages

    with explain_missing_packages():
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
