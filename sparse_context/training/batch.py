"""A batch on its way to the transformer: prepared ahead on the CPU, then encoded."""

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from ..families.host import Host, Text
from ..families.pictures import to_uint8
from ..overview import Overview, shrink
from ..selection import Selection
from ..selectors.cells import Grid
from ..tokens import ReferenceTokens
from .cache import Cache
from .data import Example


class Prepared(NamedTuple):
    """A batch before any encoder saw it: what a thread or process makes ahead of the steps.

    prompts, seen: of each sample, what its text encoder gets. target: pixels (B, 3, H, W) in [-1, 1]. references: the
    same for each reference, of any sizes. pictures: for each reference, one array uint8 (H, W, 3 or 4) for each sample,
    as selectors want them. mask: the object's share of each output token, (B, tokens) in [0, 1]; 0 without a mask.
    source: the reference token that each shows, int64 (B, tokens), as in `Example`; -1 without one.
    """

    prompts: list[str]
    seen: list[tuple[Image.Image, ...]]
    target: torch.Tensor
    references: list[torch.Tensor]
    pictures: list[list[np.ndarray]]
    mask: torch.Tensor
    source: torch.Tensor

    def grids(self, token: int) -> list[tuple[int, int]]:
        """Rows and columns of tokens of each reference."""
        return [(pixels.shape[-2] // token, pixels.shape[-1] // token) for pixels in self.references]


def prepare_batch(host: Host, examples: Sequence[Example], prompts: Sequence[str]) -> Prepared:
    """Samples whose pictures have the same sizes, on the CPU. prompts: in the place of their own."""
    references, pictures = [], []
    for i in range(len(examples[0].references)):
        pixels = [host.pixels(example.references[i]) for example in examples]
        masks = [example.masks[i] for example in examples]
        arrays = [to_uint8(each)[0] for each in pixels]
        for number, mask in enumerate(masks):
            if mask is not None:
                covered = to_uint8(host.pixels(mask.convert("RGB")))[0][..., :1]
                arrays[number] = np.concatenate([arrays[number], covered], axis=-1)
        references.append(torch.cat(pixels))
        pictures.append(arrays)
    target = torch.cat([host.pixels(example.image) for example in examples])
    grid = target.shape[-2] // host.token, target.shape[-1] // host.token
    covers = [
        torch.zeros(1, 1, *grid)
        if example.mask is None
        else nn.functional.adaptive_avg_pool2d(host.pixels(example.mask.convert("RGB"))[:, :1] / 2 + 0.5, grid)
        for example in examples
    ]
    seen = [example.references for example in examples]
    sources = [_source(example, grid, references[0].shape[-2:], host.token) for example in examples]
    for source in sources:
        if source.shape != grid:
            raise ValueError(f"The sources of a sample are {source.shape} tokens, and its output has {grid}.")
    return Prepared(
        list(prompts),
        seen,
        target,
        references,
        pictures,
        torch.cat(covers).flatten(1),
        torch.from_numpy(np.stack(sources)).flatten(1),
    )


def _source(example: Example, grid: Grid, size: Sequence[int], token: int) -> np.ndarray:
    """The source of each output token, as in `Example`. size: of its first reference, in pixels."""
    if example.source is not None:
        return example.source
    return aligned_source(grid, (size[0] // token, size[1] // token)) if example.aligned else np.full(grid, -1)


def aligned_source(grid: Grid, reference: Grid) -> np.ndarray:
    """For each output token the token at its place in a reference of another grid, int64 (rows, columns)."""
    row, column = ((2 * np.arange(n) + 1) * m // (2 * n) for n, m in zip(grid, reference, strict=True))
    return row[:, None] * reference[1] + column


@dataclass(frozen=True)
class Encoding:
    """How batches are made ready.

    workers: processes that prepare them ahead of the steps; 0 for a thread (`data.Ahead`). latent_cache, text_cache:
    what the encoders made before, on disk; None asks them anew.
    """

    workers: int = 0
    latent_cache: Cache | None = None
    text_cache: Cache | None = None


@dataclass(frozen=True)
class Encoded:
    """A batch as the transformer's surroundings see it.

    target: latents (B, C, rows, columns). references: the same for each reference, of any sizes. text: what the host
    made of it. mask, source: as in `Prepared`. overviews: latents of those that sets have, by the number of their
    reference and their factor.
    """

    target: torch.Tensor
    references: list[torch.Tensor]
    text: Text
    mask: torch.Tensor
    source: torch.Tensor
    overviews: Mapping[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    @property
    def grids(self) -> list[Grid]:
        """Rows and columns of tokens of each reference."""
        return [(int(latents.shape[-2]), int(latents.shape[-1])) for latents in self.references]


@dataclass(frozen=True, eq=False)
class TokenSet:
    """What a set keeps of the references, as in `Selection`: the sharp tokens, what stands for which, overviews."""

    index: np.ndarray
    into: np.ndarray | None = None
    overviews: Mapping[int, Overview] = field(default_factory=dict)

    @classmethod
    def of(cls, selection: Selection) -> "TokenSet":
        return cls(selection.index, selection.into, selection.overviews)


def kept_tokens(host: Host, encoded: Encoded, kept: TokenSet) -> ReferenceTokens:
    """The tokens of a set, as the transformer sees them: sharp ones, and behind them those of all overviews."""
    references = host.reference_tokens(encoded.references)
    sharp = references.keep(kept.index, kept.into)
    if not kept.overviews:
        return sharp
    latents = [encoded.overviews[i, overview.factor] for i, overview in kept.overviews.items()]
    return sharp.join(host.overview_tokens(latents, references, encoded.grids, kept.overviews))


def shown_tokens(encoded: Encoded, kept: TokenSet) -> np.ndarray:
    """The reference tokens of which a set shows anything, sorted int64: kept ones, what is averaged into them, and all
    of a reference with an overview."""
    sharp = kept.index if kept.into is None else np.flatnonzero(kept.into >= 0)
    starts = np.cumsum([0] + [rows * columns for rows, columns in encoded.grids])
    covered = [np.arange(starts[i], starts[i + 1]) for i in kept.overviews]
    return np.unique(np.concatenate([sharp, *covered]))


Autocast = Callable[[], contextlib.AbstractContextManager]
"""What makes the context of mixed precision; `contextlib.nullcontext` where there is none."""


def text_encoders(pipe: Any) -> nn.ModuleList:
    """All that a pipeline reads prompts with, as one module: FLUX.1 has two."""
    parts = (pipe.components.get(name) for name in ("text_encoder", "text_encoder_2"))
    return nn.ModuleList(part for part in parts if isinstance(part, nn.Module))


def is_wide(encoder: nn.Module) -> bool:
    """Whether mixed precision is for this encoder: its weights are float32. Others are narrow already, or have none."""
    weight = next(encoder.parameters(), None)
    return weight is not None and weight.dtype == torch.float32


def encode(
    host: Host,
    batch: Prepared,
    latent_cache: Cache | None = None,
    text_cache: Cache | None = None,
    overviews: Collection[tuple[int, int]] = (),
    autocast: Autocast = contextlib.nullcontext,
) -> Encoded:
    """Encode a batch, on the device of the transformer (without one, of the VAE). With a cache, one by one, else all
    at once.

    overviews: those to encode as well, by the number of their reference and their factor. autocast: around each
    encoder whose weights are float32. Raises OSError where a cache lacks something and its encoder is not loaded.
    """
    device = next((host.pipe.vae if host.transformer is None else host.transformer).parameters()).device

    def encode_pictures(pixels: torch.Tensor) -> torch.Tensor:
        if latent_cache is not None:
            _check_loaded(host.pipe.vae, "latents")
        with autocast() if is_wide(host.pipe.vae) else contextlib.nullcontext():
            return host.encode_pictures(pixels)

    def encode_text(prompts: Sequence[str], seen: Sequence[tuple[Image.Image, ...]]) -> Text:
        if text_cache is not None:
            _check_loaded(host.pipe.text_encoder, "texts")
        with autocast() if is_wide(text_encoders(host.pipe)) else contextlib.nullcontext():
            return host.encode_text(prompts, seen)

    def latents(pixels: torch.Tensor) -> torch.Tensor:
        if latent_cache is None:
            return encode_pictures(pixels).to(device).float()
        encoded = [
            latent_cache.get(
                repr(tuple(sample.shape)).encode() + sample.numpy().tobytes(),
                lambda sample=sample: {"latents": encode_pictures(sample)},  # type: ignore[misc]
            )["latents"]
            for sample in pixels.split(1)
        ]
        return torch.cat(encoded).to(device).float()

    if text_cache is None:
        text = encode_text(batch.prompts, batch.seen)
    else:
        parts = []
        for prompt, pictures in zip(batch.prompts, batch.seen, strict=True):
            seen = pictures if host.text_sees_references else ()
            key = "\0".join([prompt, *map(str, (p.size for p in seen))]).encode()
            key += b"".join(picture.tobytes() for picture in seen)
            parts.append(
                text_cache.get(key, lambda p=prompt, s=seen: encode_text([p], [s]))  # type: ignore[misc]
            )
        text = _join(parts)
    grids = batch.grids(host.token)
    return Encoded(
        latents(batch.target),
        [latents(pixels) for pixels in batch.references],
        {name: tensor.to(device) for name, tensor in text.items()},
        batch.mask.to(device),
        batch.source.to(device),
        {(i, factor): latents(shrink(batch.references[i], grids[i], factor)) for i, factor in overviews},
    )


def _join(parts: Sequence[Text]) -> Text:
    """The texts of several prompts as those of a batch: shorter ones are padded, where a mask says so."""
    text = {}
    for name in parts[0]:
        tensors = [part[name] for part in parts]
        if len({tensor.shape for tensor in tensors}) > 1:
            if f"{name}_mask" not in parts[0] and not name.endswith("_mask"):
                raise ValueError(
                    "The prompts of a batch have several padded lengths, which this model does not mix: pass "
                    "train_batch_size=1."
                )
            longest = max(tensor.shape[1] for tensor in tensors)
            tensors = [
                torch.cat([tensor, tensor.new_zeros(1, longest - tensor.shape[1], *tensor.shape[2:])], 1)
                for tensor in tensors
            ]
        text[name] = torch.cat(tensors)
    return text


def _check_loaded(encoder: Any, made: str) -> None:
    if encoder is None:
        raise OSError(
            f"A file of the cache of {made} is gone or damaged, and its encoder is not loaded beside the transformer: "
            "resume the run, which fills its caches first."
        )
