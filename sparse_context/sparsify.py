"""Switch Sparse Context on and off for a pipeline.

    apply_sparse_context(pipe, keep=0.2)
    pipe(image=[cat, room], prompt="the cat in the room")
    print(last_selection(pipe))
    remove_sparse_context(pipe)

Only this instance is changed: its class, other pipelines and the shared transformer stay as they are.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from .cache import ReferenceCache
from .families import find_family
from .selection import Selection, SparseContextConfig, score_tokens, select_tokens
from .selectors import user_mask
from .tokens import ReferenceTokens

ATTRIBUTE = "_sparse_context"


class SparseContext:
    """What is installed on one pipeline: its config, the selection of its last call, and how to undo it all."""

    def __init__(self, config: SparseContextConfig, cache: ReferenceCache | None = None) -> None:
        self.config = config
        self.cache = cache
        self.selection: Selection | None = None
        self._overridden: list[tuple[Any, str, bool, Any]] = []

    def __deepcopy__(self, memo: dict) -> Any:
        raise TypeError(
            "A pipeline with Sparse Context cannot be copied, for what is installed would go on with the original's "
            "parts: call remove_sparse_context first, and apply it to both again."
        )

    def override(self, owner: Any, name: str, value: Any) -> None:
        """Set `owner.name` on the instance, and remember what stood there."""
        own = vars(owner)
        self._overridden.append((owner, name, name in own, own.get(name)))
        setattr(owner, name, value)

    def restore(self) -> None:
        """Undo every override, last first."""
        while self._overridden:
            owner, name, had_own, before = self._overridden.pop()
            if had_own:
                setattr(owner, name, before)
            else:
                delattr(owner, name)

    def keep(
        self,
        tokens: ReferenceTokens,
        grids: Sequence[tuple[int, int]],
        picture: Callable[[int, np.ndarray | None], Any],
        shown: Sequence[np.ndarray | None] | None = None,
    ) -> ReferenceTokens:
        """Choose among the reference tokens of one call, return what is kept of them, and remember the selection.

        `grids` is one (rows, columns) per reference; `picture(i, mask)` gives the pixels of reference i as selectors
        want them, with the user's mask (or None) carried through the pipeline's own resize and crop. `shown` tells
        tokens from padding (`select_tokens`).
        """
        start = time.perf_counter()
        pictures = [picture(i, user_mask(self.config.selector, i)) for i in range(len(grids))]
        making = time.perf_counter() - start  # which is a part of what choosing costs
        score = score_tokens if self.cache is None else self.cache.score
        selection = select_tokens(pictures, grids, self.config, shown, score)
        self.selection = replace(selection, seconds=making + selection.seconds)
        return tokens.keep(selection.index, selection.into)


def apply_sparse_context(
    pipe: Any, config: SparseContextConfig | None = None, *, cache: ReferenceCache | None = None, **changes: Any
) -> None:
    """From the next call on, keep only the reference tokens that matter.

    pipe: a diffusers pipeline of a supported class (see `families.FAMILIES`).
    config: what to keep; the default keeps a fifth. Single fields can be given as keywords instead or on top:
        `apply_sparse_context(pipe, keep=0.1, selector="saliency")`.
    cache: remembers the scores of references that come again, and with FLUX.2 their latents too. None: every call
        makes them anew. It is yours, so that it outlives applying again and can serve several pipelines.

    Applying again replaces what was applied before, and is cheap enough to do for each call. Raises TypeError for a
    pipeline or a cache of another kind and ValueError for a setting out of range; the pipeline is then left as it was.
    """
    attach = find_family(pipe)
    if not isinstance(config, SparseContextConfig | None):
        raise TypeError(f"config is {config!r}: pass a SparseContextConfig, or name what it holds, as in keep=0.2.")
    if not isinstance(cache, ReferenceCache | None):
        raise TypeError(f"cache is {cache!r}: pass a ReferenceCache(), or None.")
    config = replace(config or SparseContextConfig(), **changes)
    remove_sparse_context(pipe)
    context = SparseContext(config, cache)
    attach(pipe, context)
    setattr(pipe, ATTRIBUTE, context)


def remove_sparse_context(pipe: Any) -> None:
    """Give the pipeline back exactly as it was. Does nothing where nothing was applied."""
    context = vars(pipe).get(ATTRIBUTE)
    if context is not None:
        context.restore()
        delattr(pipe, ATTRIBUTE)


def last_selection(pipe: Any) -> Selection | None:
    """What was kept in the pipeline's last call: None before the first, or when it had no references."""
    context = vars(pipe).get(ATTRIBUTE)
    return None if context is None else context.selection
