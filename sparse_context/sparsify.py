"""Switch Sparse Context on and off for a pipeline.

    apply_sparse_context(pipe, keep=0.2)
    pipe(image=[cat, room], prompt="the cat in the room")
    print(last_selection(pipe))
    remove_sparse_context(pipe)

Only this instance is changed: its class, other pipelines and the shared transformer stay as they are. A shallow copy of
it is another sparse pipeline, with the same config and cache; deep copies and pickles are refused.
"""

from dataclasses import replace
from typing import Any

from .cache import ReferenceCache
from .config import SparseContextConfig
from .context import SparseContext, context_of, install, uninstall
from .families import family_of, find_attach
from .layers import require
from .selection import Selection
from .trained import note_checkpoint


def apply_sparse_context(
    pipe: object,
    config: SparseContextConfig | None = None,
    *,
    cache: ReferenceCache | None = None,
    together: bool = False,
    **changes: Any,
) -> None:
    """From the next call on, keep only the reference tokens that matter.

    pipe: a diffusers pipeline of a supported class (see `families.FAMILIES`).
    config: what to keep; the default keeps a fifth. Single fields can be given as keywords instead or on top:
        `apply_sparse_context(pipe, keep=0.1, selector="saliency")`.
    cache: remembers the scores of references that come again, and with the plain FLUX.2 pipelines their latents too.
        None: every call makes them anew. It is yours, so that it outlives applying again and can serve several
        pipelines.

    together: encode references of one size as one batch, as far as they have a megapixel together (plain FLUX.2
        pipelines, without a cache). Small ones are encoded a little faster; the last digits of latents may differ.

    What the config leaves to the weights (`overview="trained"`) each call asks of those that are in effect by then: a
    LoRA that `pipelines.load` read and a checkpoint's folder say what they were trained for, and `trained.note_trained`
    says it for what was loaded otherwise. The report of a call says so.

    Applying again replaces what was applied before, and is cheap enough to do for each call. Raises TypeError for a
    pipeline or a cache of another kind, ValueError for a setting out of range, and ImportError where diffusers is not
    installed; the pipeline is then left as it was.
    """
    require("diffusers")
    attach = find_attach(pipe)
    if not isinstance(config, SparseContextConfig | None):
        raise TypeError(f"config is {config!r}: pass a SparseContextConfig, or name what it holds, as in keep=0.2.")
    if not isinstance(cache, ReferenceCache | None):
        raise TypeError(f"cache is {cache!r}: pass a ReferenceCache(), or None.")
    config = replace(config or SparseContextConfig(), **changes)
    note_checkpoint(getattr(pipe, "transformer", None))
    install(pipe, SparseContext(config, attach, cache, kv=family_of(pipe).kv, together=together))


def remove_sparse_context(pipe: object) -> None:
    """Give the pipeline back exactly as it was. Does nothing where nothing was applied."""
    uninstall(pipe)


def last_selection(pipe: object) -> Selection | None:
    """What was kept in the pipeline's last call: None before the first, or when it had no references."""
    context = context_of(pipe)
    return None if context is None else context.selection
