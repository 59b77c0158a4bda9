"""A batch on its way to the transformer: prepared ahead on the CPU, then encoded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from ..families.host import Host, Text
from ..families.pictures import to_uint8
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
        if all(mask is not None for mask in masks):
            covered = [to_uint8(host.pixels(mask.convert("RGB")))[0][..., :1] for mask in masks if mask is not None]
            arrays = [np.concatenate(pair, axis=-1) for pair in zip(arrays, covered, strict=True)]
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
    sources = [np.full(grid, -1) if example.source is None else example.source for example in examples]
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
    made of it. mask, source: as in `Prepared`.
    """

    target: torch.Tensor
    references: list[torch.Tensor]
    text: Text
    mask: torch.Tensor
    source: torch.Tensor


def encode(host: Host, batch: Prepared, latent_cache: Cache | None = None, text_cache: Cache | None = None) -> Encoded:
    """Encode a batch, on the device of the transformer. With a cache, one by one, else all at once."""
    device = next(host.transformer.parameters()).device

    def latents(pixels: torch.Tensor) -> torch.Tensor:
        if latent_cache is None:
            return host.encode_pictures(pixels).to(device).float()
        encoded = [
            latent_cache.get(
                repr(tuple(sample.shape)).encode() + sample.numpy().tobytes(),
                lambda sample=sample: {"latents": host.encode_pictures(sample)},  # type: ignore[misc]
            )["latents"]
            for sample in pixels.split(1)
        ]
        return torch.cat(encoded).to(device).float()

    if text_cache is None:
        text = host.encode_text(batch.prompts, batch.seen)
    else:
        parts = []
        for prompt, pictures in zip(batch.prompts, batch.seen, strict=True):
            seen = pictures if host.text_sees_references else ()
            key = "\0".join([prompt, *map(str, (p.size for p in seen))]).encode()
            key += b"".join(picture.tobytes() for picture in seen)
            parts.append(
                text_cache.get(key, lambda p=prompt, s=seen: host.encode_text([p], [s]))  # type: ignore[misc]
            )
        text = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return Encoded(
        latents(batch.target),
        [latents(pixels) for pixels in batch.references],
        {name: tensor.to(device) for name, tensor in text.items()},
        batch.mask.to(device),
        batch.source.to(device),
    )
