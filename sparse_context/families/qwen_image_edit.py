"""Qwen-Image-Edit, its inpainting, and Edit-Plus (2509, 2511).

These have no position ids: the transformer derives its rotary rows from `img_shapes`, a local of the call. So tokens
are chosen where `prepare_latents` makes them, their ids being the numbers of their rotary rows, and cut at the door of
the transformer: hooks hand it the kept tokens as one strip and give each its own row. The hooks are there for the
length of this pipeline's denoising loop and act in its thread alone, so another pipeline with the same transformer,
even one that denoises at the same time, is as it was.

The text encoder sees the pictures as well, as vision tokens in the prompt, and those are left alone: what is dropped
here still reaches the model that way, coarsely.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from math import prod
from threading import get_ident
from typing import TYPE_CHECKING, Any

import torch

from ..tokens import ReferenceTokens
from .pictures import Pictures

if TYPE_CHECKING:
    from ..sparsify import SparseContext


def attach(pipe: Any, context: "SparseContext") -> None:
    """Cut the reference tokens that `pipe` hands to its transformer, during its own calls only."""
    pictures = Pictures(context, pipe.image_processor)
    preprocess, check_inputs = pipe.image_processor.preprocess, pipe.check_inputs
    prepare_latents, progress_bar = pipe.prepare_latents, pipe.progress_bar
    seen: list[torch.Tensor] = []  # the preprocessed references of this call, which the host then hands on as views
    kept = ReferenceTokens(torch.empty(1, 0, 1), torch.empty(0, 1))
    shapes: list[tuple[int, int, int]] = []  # of the whole references, (1, rows, columns)
    thread: int | None = None  # the one that denoises

    def start_call(*args, **kwargs):
        context.selection = None
        seen.clear()
        return check_inputs(*args, **kwargs)

    def remember(image, *args, **kwargs):
        seen.append(preprocess(image, *args, **kwargs))
        return seen[-1]

    def choose(*args, **kwargs):
        nonlocal kept, shapes
        prepared = prepare_latents(*args, **kwargs)
        side = 2 * pipe.vae_scale_factor
        grids = [(pixels.shape[2] // side, pixels.shape[3] // side) for pixels in seen]
        tokens = ReferenceTokens(prepared[-1], torch.arange(prepared[-1].shape[1])[:, None])
        kept = context.keep(tokens, grids, lambda i, mask: pictures.show(seen[i], mask, i))
        shapes = [(1, *grid) for grid in grids]
        seen.clear()
        return prepared

    # A hook that another thread removes in the middle of a forward is called without its `kwargs` there
    def hand_over_kept(transformer, args, kwargs=None):
        if get_ident() != thread:
            return None
        output = kwargs["img_shapes"][0][0]
        strip = [[output, (1, 1, len(kept))]] * len(kwargs["img_shapes"])
        tokens = torch.cat([kwargs["hidden_states"][:, : prod(output)], kept.latents], dim=1)
        return args, kwargs | {"hidden_states": tokens, "img_shapes": strip}

    @contextmanager
    def denoise(*args, **kwargs):
        nonlocal thread
        thread = get_ident()
        hook = pipe.transformer.register_forward_pre_hook(hand_over_kept, with_kwargs=True)
        try:
            with rotary_rows(pipe.transformer, shapes, kept.ids[:, 0]), progress_bar(*args, **kwargs) as bar:
                yield bar
        finally:
            hook.remove()

    context.override(pipe, "check_inputs", start_call)
    context.override(pipe.image_processor, "preprocess", remember)
    context.override(pipe, "prepare_latents", choose)
    context.override(pipe, "progress_bar", denoise)


@contextmanager
def rotary_rows(transformer: Any, shapes: Sequence[tuple[int, int, int]], rows: torch.Tensor) -> Iterator[None]:
    """Within it and in this thread, reference tokens have the rotary rows `rows` of whole references of these shapes.

    shapes: (1, rows, columns) of each reference. rows: int64, 1-D, counted over all their tokens. The transformer is to
    be called with the output's shape first, and any shapes with as many tokens as `rows` has behind it.
    """
    thread = get_ident()

    def ask_for_whole(pos_embed, args):
        if get_ident() != thread:
            return None
        return [[sample[0], *shapes] for sample in args[0]], *args[1:]

    def take_own_rows(pos_embed, args, rotary):
        if get_ident() != thread:
            return None
        output = prod(args[0][0][0])
        own = torch.cat([torch.arange(output), output + rows])
        return rotary[0].index_select(0, own.to(rotary[0].device)), rotary[1]

    with ExitStack() as hooks:
        hooks.callback(transformer.pos_embed.register_forward_pre_hook(ask_for_whole).remove)
        hooks.callback(transformer.pos_embed.register_forward_hook(take_own_rows).remove)
        yield
