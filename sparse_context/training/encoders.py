"""The encoders' part of a run, done before its steps, so that they are never loaded beside the transformer.

The pipeline is loaded without its transformer, what the run will ask of its encoders is put into the caches, and the
prompts of validation pictures are remembered. Then it is let go, and one without text encoders takes its place.
"""

import functools
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from PIL import Image
from torch.utils._pytree import tree_leaves, tree_map
from tqdm import tqdm

from ..families.host import Host
from ..pipelines.arguments import call_of
from .batch import Autocast, Encoding, encode, prepare_batch
from .config import TrainConfig
from .data import Example
from .validation import validation_request

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


def fill_caches(
    host: Host,
    examples: Iterable[Example],
    count: int,
    config: TrainConfig,
    encoding: Encoding,
    autocast: Autocast,
    bar: bool = True,
) -> None:
    """Encode what a run of `config` may ask of `count` samples: their images, overviews and prompts, and the empty
    prompt where it drops captions. What the caches hold already is read and not made anew."""
    emptied = bool(config.caption_dropout)
    for example in tqdm(examples, total=count, desc="caches", unit="sample", mininterval=5, disable=not bar):
        overviews = [
            (i, factor) for i in range(len(example.references)) for factor in set(config.dropping.overview_factors)
        ]
        caches = encoding.latent_cache, encoding.text_cache
        encode(host, prepare_batch(host, [example], [example.prompt]), *caches, overviews, autocast)
        if emptied:
            encode(host, prepare_batch(host, [example], [""]), *caches, (), autocast)
            emptied = host.text_sees_references  # else one serves all


class Prompts:
    """What a pipeline's `encode_prompt` made of the prompts of validation pictures, by their texts and pictures."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self._made)

    def remember(self, pipe: Any, examples: Sequence[Example], autocast: Autocast) -> None:
        """Have `pipe`, whose transformer is not loaded, encode the prompts of calls for these examples."""
        encode_prompt, transformer = pipe.encode_prompt, pipe.transformer

        @functools.wraps(encode_prompt)
        def remembering(*args: Any, **kwargs: Any) -> Any:
            made = encode_prompt(*args, **kwargs)
            self._made[_key(args, kwargs)] = tree_map(_to("cpu"), made)
            return made

        pipe.encode_prompt, pipe.transformer = remembering, _NotLoaded()
        try:
            for example in examples:
                _, arguments, _ = call_of(pipe, validation_request(example, pipe, 1.0))
                try:
                    with autocast():
                        pipe(prompt=example.prompt, **arguments)
                except _Reached:
                    pass
        finally:
            pipe.encode_prompt, pipe.transformer = encode_prompt, transformer

    def recall(self, pipe: Any) -> None:
        """Have `pipe`, whose text encoders are not loaded, take what is remembered, in its transformer's type."""
        encode_prompt = pipe.encode_prompt

        @functools.wraps(encode_prompt)
        def recalling(*args: Any, **kwargs: Any) -> Any:
            made = self._made.get(_key(args, kwargs))
            if made is None:
                raise ValueError("The prompt was not encoded before the run, and its text encoder is not loaded.")
            return tree_map(_to(pipe.transformer.device, pipe.transformer.dtype), made)

        pipe.encode_prompt = recalling


class _Reached(BaseException):
    """A pipeline got as far as its transformer."""


class _NotLoaded:
    """Stands for a transformer; a pipeline asks it first for its config, once all prompts are encoded."""

    def __getattr__(self, name: str) -> Any:
        raise _Reached


def _key(args: Any, kwargs: Any) -> str:
    """Tells calls of `encode_prompt` by the texts and pictures in them; the rest is the same in all of a run."""
    digest = hashlib.sha256()
    for value in tree_leaves((args, dict(sorted(kwargs.items())))):
        if isinstance(value, str):
            digest.update(b"\0text" + value.encode())
        elif isinstance(value, Image.Image):
            digest.update(b"\0picture" + str(value.size).encode() + value.tobytes())
    return digest.hexdigest()


def _to(device: torch.device | str, dtype: torch.dtype | None = None) -> Callable[[Any], Any]:
    """Moves tensors; those of floating point become `dtype`."""

    def move(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(device, dtype if value.is_floating_point() else None)

    return move
