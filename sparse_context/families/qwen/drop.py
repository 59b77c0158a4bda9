"""Qwen-Image-Edit, its inpainting, and Edit-Plus (2509, 2511).

These have no position ids: the transformer derives its rotary rows from `img_shapes`, a local of the call. So tokens
are chosen where `prepare_latents` makes them, their ids being the numbers of their rotary rows, and cut at the door of
the transformer. What is kept goes there with the call's inputs, in `attention_kwargs`, and hooks put it in its place.
They look at nothing else, so they do for any number of calls at once, whoever makes them, leave a call without it
alone, and can be compiled with the transformer.

The text encoder sees the pictures as well, as vision tokens in the prompt, and those are left alone: what is dropped
here still reaches the model that way, coarsely. It is asked before there is an overview, which it never sees.
"""

import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from ...overview import Overview, shrink
from ...selectors.cells import Grid
from ...tokens import ReferenceTokens
from ..pictures import Pictures

if TYPE_CHECKING:
    from ...context import Call

KEY = "sparse_context"  # of the kept tokens in `attention_kwargs`

APART = 4  # frames from a reference to its overview, for each doubling: the models are made for three pictures

Shape = tuple[int, int, int]  # 1, rows and columns


class KeptTokens(NamedTuple):
    """What a call keeps of its references.

    rows: the rotary rows of the kept tokens (K,), int64, counted over all tokens of `shapes`.
    strip: their shape, (1, 1, K): as a number of its own, so that no graph has to derive it.
    shapes: of the whole references, and then those that overviews have their rows of.
    latents: the kept tokens (B, K, C), to take the place of the whole references in `hidden_states`; None where
        they stand there already.
    """

    rows: torch.Tensor
    strip: Shape
    shapes: list[Shape]
    latents: torch.Tensor | None = None


def attach(pipe: Any, call: "Call") -> None:
    """Cut the reference tokens that `pipe` hands to its transformer."""
    pictures = Pictures()
    kept: KeptTokens | None = None
    hooked: set[int] = set()  # the ids of the transformers that this call has run on

    def choose(prepare_latents, *args, **kwargs):
        nonlocal kept
        prepared: tuple[torch.Tensor, ...] = ()
        seen = pictures.preprocessed  # the references, which the pipeline then hands on as views
        side = 2 * pipe.vae_scale_factor
        grids = [(pixels.shape[2] // side, pixels.shape[3] // side) for pixels in seen]
        shapes = [(1, *grid) for grid in grids]

        def make() -> ReferenceTokens:
            nonlocal prepared
            prepared = prepare_latents(*args, **kwargs)
            return ReferenceTokens(prepared[-1], torch.arange(prepared[-1].shape[1])[:, None])

        def encode_overviews(overviews: Mapping[int, Overview], _: ReferenceTokens) -> ReferenceTokens:
            small = [shrink(seen[i], grids[i], each.factor).unsqueeze(2) for i, each in overviews.items()]
            arguments = inspect.signature(type(pipe).prepare_latents).bind(pipe, *args, **kwargs).arguments
            del arguments["self"]
            height, width = small[0].shape[-2:]
            # Its noise goes to waste, and inpainting also samples what its VAE makes: not with the user's generator
            others = {"height": height, "width": width, "generator": torch.Generator().manual_seed(0), "latents": None}
            images = {"images": small} if "images" in arguments else {"image": small[0]}
            latents = prepare_latents(**{**arguments, **others, **images})[-1]
            rows, more_shapes = place_overviews(grids, overviews)
            shapes.extend(more_shapes)
            return ReferenceTokens(latents, rows[:, None])

        chosen = call.keep(
            make, grids, lambda i, mask: pictures.show(seen[i], mask, i), encode_overviews=encode_overviews
        )
        rows = chosen.ids[:, 0].to(chosen.latents.device, non_blocking=True)
        kept = KeptTokens(rows, (1, 1, len(rows)), shapes)
        if hasattr(pipe, "prepare_mask_latents"):  # inpaint, which blends with the whole source at every step
            kept = kept._replace(latents=chosen.latents)
            return prepared
        return *prepared[:-1], chosen.latents

    def hand_over(attention_kwargs):
        """A pipeline asks for them anew for every forward, so a transformer that was exchanged has hooks as well."""
        if kept is None or attention_kwargs is None:
            return attention_kwargs
        if id(pipe.transformer) not in hooked:
            hooked.add(id(pipe.transformer))
            call.closing.enter_context(taking_kept_tokens(pipe.transformer))
        return {**attention_kwargs, KEY: kept}

    call.replace("image_processor", pictures.watch)
    call.around("prepare_latents", choose)
    call.replace("_attention_kwargs", hand_over)


def place_overviews(grids: Sequence[Grid], overviews: Mapping[int, Overview]) -> tuple[torch.Tensor, list[Shape]]:
    """The rotary rows of overviews, int64 (N,), one overview after another, and the shapes in which these are counted,
    behind those of the whole references. grids: of the whole references.

    A row is that of a whole place: so a token that is spread takes the cell nearest to its middle (before it, where two
    are), at the frame of its reference and `APART` more for each doubling of the factor, which marks the scale. Where
    there are more references, they lie as far apart as these are many. The frames between hold a token that is not
    asked for: the place of a shape in their list is its frame. As a further reference an overview has a frame of its
    own, after all others.
    """
    start = sum(rows * columns for rows, columns in grids)
    if {each.layout for each in overviews.values()} != {"spread"}:
        count = sum(each.tokens for each in overviews.values())
        return start + torch.arange(count), [(1, *each.grid) for each in overviews.values()]
    apart = max(APART, len(grids))
    frames = {
        i + apart * round(math.log2(each.factor)): i for i, each in overviews.items()
    }  # from 0, that of the first
    shapes = [(1, *grids[frames[n]]) if n in frames else (1, 1, 1) for n in range(len(grids), max(frames) + 1)]
    starts = dict(enumerate(itertools.accumulate(map(_count, shapes), initial=start), start=len(grids)))
    places = {i: starts[frame] for frame, i in frames.items()}
    rows = [places[i] + _middle_cells(grids[i], each) for i, each in overviews.items()]
    return torch.cat(rows), shapes


def _middle_cells(grid: Grid, overview: Overview) -> torch.Tensor:
    """Flat indices of the cells of a grid that are nearest to the middles of its overview's."""
    before = (overview.factor - 1) // 2
    row, column = (
        (torch.arange(coarse) * overview.factor + before).clamp(max=whole - 1)
        for coarse, whole in zip(overview.grid, grid, strict=True)
    )
    return (row[:, None] * grid[1] + column).flatten()


@contextmanager
def taking_kept_tokens(transformer: Any) -> Iterator[None]:
    """Within it, a forward with `attention_kwargs={KEY: KeptTokens(...)}` sees those as all of its references.

    Any other is as it was. `img_shapes` is to have the output's shape first, and `hidden_states` its tokens.
    """
    with _hooked(transformer, _at_the_door), _hooked(transformer.pos_embed, _around_rotary_rows):
        yield


class _Shapes(list):
    """What the transformer counts its tokens by, with what `pos_embed` finds their rotary rows by."""

    def __init__(self, shapes: Sequence[Shape], rows: torch.Tensor, whole: Sequence[Shape]) -> None:
        super().__init__(shapes)
        self.rows, self.whole = rows, whole

    def to(self, device: Any, non_blocking: bool = False) -> "_Shapes":
        """So that accelerate's offloading moves it as a whole, and does not take it for a list."""
        return _Shapes(self, self.rows.to(device, non_blocking=non_blocking), self.whole)


def _count(shape: Shape) -> int:
    return shape[0] * shape[1] * shape[2]


# A hook that another thread removes in the middle of a forward is called without its `kwargs` there
def _put_kept_tokens(transformer, args, kwargs=None):
    attention_kwargs = (kwargs or {}).get("attention_kwargs") or {}
    if KEY not in attention_kwargs:
        return None
    rows, strip, whole, latents = attention_kwargs[KEY]
    output = kwargs["img_shapes"][0][0]
    hidden_states = kwargs["hidden_states"]
    if latents is not None:
        hidden_states = torch.cat([hidden_states[:, : _count(output)], latents], dim=1)
    return args, kwargs | {
        "hidden_states": hidden_states,
        "img_shapes": [_Shapes([output, strip], rows, whole)] * len(kwargs["img_shapes"]),
        "attention_kwargs": {name: value for name, value in attention_kwargs.items() if name != KEY},
    }


def _ask_for_whole(pos_embed, args):
    if not isinstance(args[0][0], _Shapes):
        return None
    shapes = args[0][0]
    return [_Shapes([shapes[0], *shapes.whole], shapes.rows, shapes.whole)], *args[1:]


def _take_kept_rows(pos_embed, args, rotary):
    if not isinstance(args[0][0], _Shapes):
        return None
    shapes = args[0][0]
    output = _count(shapes[0])
    rows = torch.cat([torch.arange(output, device=shapes.rows.device), output + shapes.rows])
    return rotary[0].index_select(0, rows.to(rotary[0].device)), rotary[1]


_installed: WeakKeyDictionary[torch.nn.Module, tuple[list, int]] = WeakKeyDictionary()  # hooks, and how many need them
_lock = Lock()


@contextmanager
def _hooked(module: Any, register: Callable[[Any], list]) -> Iterator[None]:
    """Within it, `module` has the hooks that `register` puts on it: once, however many calls need them at a time."""
    with _lock:
        hooks, needed_by = _installed.get(module) or (register(module), 0)
        _installed[module] = hooks, needed_by + 1
    try:
        yield
    finally:
        with _lock:
            hooks, needed_by = _installed.pop(module)
            if needed_by > 1:
                _installed[module] = hooks, needed_by - 1
            else:
                for hook in hooks:
                    hook.remove()


def _at_the_door(transformer: Any) -> list:
    return [transformer.register_forward_pre_hook(_put_kept_tokens, with_kwargs=True)]


def _around_rotary_rows(pos_embed: Any) -> list:
    return [
        pos_embed.register_forward_pre_hook(_ask_for_whole),
        pos_embed.register_forward_hook(_take_kept_rows),
    ]
