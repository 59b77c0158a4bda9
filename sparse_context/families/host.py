"""The interface by which the trainer reaches a family of pipelines: encode pictures and prompts, and predict.

A host knows what its pipeline does around the transformer, and nothing of training: which pixels the VAE gets, which
position ids tokens have, and in which order they go in. Everything is done with the pipeline's own methods. To add one,
derive a class from `Host` in the family's train.py, and name it in the lines of its pipelines in `FAMILIES`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from PIL import Image

from ..overview import Overview
from ..selectors.cells import Grid
from ..tokens import ReferenceTokens

Text = dict[str, torch.Tensor]
"""What a host makes of prompts; the first axis of each tensor is the batch."""

Head = tuple[int, int]
"""Block and head of a transformer, from 0."""

Looks = Callable[[int, int], list[torch.Tensor]]
"""From how many tokens the output and the references have to where each of some heads looked from the output's tokens:
log-probabilities (B, output tokens, 1 + references), of all that is no reference, and of each reference token."""

GUIDANCE = 3.5  # what diffusers' own script trains FLUX.2 dev with, whose guidance is distilled

ATTENTION = ["to_k", "to_q", "to_v", "to_out.0"]  # what diffusers' own scripts adapt by default


class Host(ABC):
    """One family of pipelines, as the trainer sees it. Shapes: B samples, tokens of C channels, A axes of positions.

    pipe: the pipeline; validation calls it. kv: whether it is one that caches, in KV mode.
    transformer: what is trained. With an adapter on it, `transformer.disable_adapters()` gives the base.
    settings: what the model wants of a call.
    token: pixels a side of a token.
    shift: how far noise levels move towards noise, as the scheduler's own `shift`; 1 leaves them.
    """

    text_sees_references = False
    """Whether `encode_text` looks at the pictures. If not, what it makes of a prompt serves all that have it."""

    has_kv = False
    """Whether there is a KV mode."""

    def __init__(self, pipe: Any, settings: Mapping[str, Any], kv: bool = False) -> None:
        """Raises ValueError for `kv`, which asks for KV mode, where the family has none."""
        if kv and not self.has_kv:
            raise ValueError(f"KV mode is for FLUX.2 klein: {type(pipe).__name__} has no pipeline that runs it.")
        self.pipe, self.settings, self.kv = pipe, settings, kv
        self.transformer: Any = pipe.transformer
        self.token = 2 * pipe.vae_scale_factor
        self.shift = float(pipe.scheduler.config.shift)

    def lora_targets(self) -> list[str]:
        """The modules of the transformer that LoRA adapts by default."""
        return ATTENTION

    def check_heads(self, heads: Sequence[Head]) -> None:
        """Raise ValueError for heads that cannot be watched."""
        raise ValueError(
            f"teach_heads is for FLUX.2: the heads of {type(self.pipe).__name__} cannot be taught where to look, so "
            "leave teach and teach_heads out."
        )

    def watch_heads(self, heads: Sequence[Head]) -> AbstractContextManager[Looks]:
        """Within it, `velocity` is watched once, and afterwards what it gives says where `heads` looked."""
        raise NotImplementedError

    @abstractmethod
    def pixels(self, picture: Image.Image) -> torch.Tensor:
        """A picture as the pipeline hands it to its VAE: float32 (1, 3, H, W) in [-1, 1], resized and cropped by it.

        Asked ahead of the steps, by another thread, while validation may call the pipeline: nothing of it is changed.
        """

    @abstractmethod
    def encode_pictures(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H, W) -> latents (B, C, rows, columns), one cell a token, as the transformer wants them."""

    @abstractmethod
    def encode_text(self, prompts: Sequence[str], pictures: Sequence[Sequence[Image.Image]]) -> Text:
        """What the transformer gets of prompts. `pictures` has each sample's references, for encoders that see them."""

    @abstractmethod
    def target_tokens(self, latents: torch.Tensor) -> ReferenceTokens:
        """Latents (B, C, rows, columns) of the output -> its tokens and their position ids."""

    @abstractmethod
    def reference_tokens(self, latents: Sequence[torch.Tensor]) -> ReferenceTokens:
        """Latents of each reference, (B, C, rows, columns) of any sizes -> all tokens, one reference after another."""

    @abstractmethod
    def overview_tokens(
        self,
        latents: Sequence[torch.Tensor],
        references: ReferenceTokens,
        grids: Sequence[Grid],
        overviews: Mapping[int, Overview],
    ) -> ReferenceTokens:
        """Latents of each overview -> all their tokens, one overview after another, at their places.

        latents: (B, C, rows, columns) of each, in the order of `overviews`. references: all tokens of the whole
        references, which have these grids. overviews: by the number of their reference. The places are made by what
        makes them at inference, in the family's drop.py.
        """

    @abstractmethod
    def velocity(
        self,
        noisy: ReferenceTokens,
        sigma: torch.Tensor,
        text: Text,
        references: ReferenceTokens,
        teacher: bool = False,
    ) -> torch.Tensor:
        """The transformer's velocity on the output tokens, (B, N, C), at noise levels `sigma` (B,) in [0, 1].

        `references` has the tokens that are kept. `teacher` asks for the forward of the published model where training
        uses another one (KV mode of a plain model).
        """

    def vae_latents(self, pixels: torch.Tensor) -> torch.Tensor:
        """What the pipeline's own `_encode_vae_image` makes of pixels, on the VAE's device and in its dtype."""
        vae = self.pipe.vae
        return self.pipe._encode_vae_image(pixels.to(vae.device, vae.dtype), generator=None)

    def guidance(self, batch: int, device: torch.device) -> torch.Tensor | None:
        """The strength of a distilled guidance, (batch,); None where the transformer embeds none."""
        if not getattr(self.transformer.config, "guidance_embeds", False):
            return None
        return torch.full([batch], GUIDANCE, device=device)


def flat(latents: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, rows, columns) as tokens (B, rows * columns, C)."""
    return latents.flatten(2).transpose(1, 2)
