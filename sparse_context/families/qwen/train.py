"""Qwen-Image-Edit-Plus as the trainer sees it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch.nn import functional

from ...overview import Overview
from ...selectors.cells import Grid
from ...tokens import ReferenceTokens
from ..host import Host, Text, flat
from .drop import KEY, KeptTokens, place_overviews, taking_kept_tokens


class QwenImageEditPlus(Host):
    """Qwen-Image-Edit-Plus (2509, 2511), which scales every picture to about a megapixel.

    It has no position ids, only rotary rows that follow from the shapes. So a reference token's id is the number of its
    row (N, 1), in the shapes of the references of the last `reference_tokens`, or with those of the last
    `overview_tokens` behind them, and an output token's id is the output's shape (N, 3). Its text encoder sees the
    references, in a smaller size; prompts are padded to a multiple of 512.
    """

    text_sees_references = True

    def __init__(self, pipe: Any, settings: Mapping[str, Any], kv: bool = False) -> None:
        super().__init__(pipe, settings, kv)
        self._shapes: list[tuple[int, int, int]] = []

    def pixels(self, picture: Image.Image) -> torch.Tensor:
        from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as edit_plus

        width, height = edit_plus.calculate_dimensions(edit_plus.VAE_IMAGE_SIZE, picture.width / picture.height)
        return self.pipe.image_processor.preprocess(picture, height, width)

    @torch.no_grad()
    def encode_pictures(self, pixels: torch.Tensor) -> torch.Tensor:
        latents = self.vae_latents(pixels.unsqueeze(2))
        return functional.pixel_unshuffle(latents.squeeze(2), 2)  # the channel order of the pipeline's own packing

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str], pictures: Sequence[Sequence[Image.Image]]) -> Text:
        from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as edit_plus

        encoded = []
        for prompt, references in zip(prompts, pictures, strict=True):
            small = []
            for picture in references:
                aspect = picture.width / picture.height
                width, height = edit_plus.calculate_dimensions(edit_plus.CONDITION_IMAGE_SIZE, aspect)
                small.append(self.pipe.image_processor.resize(picture, height, width))
            embeds, mask = self.pipe.encode_prompt([prompt], small, device=self.pipe.text_encoder.device)
            encoded.append((embeds, torch.ones(embeds.shape[:2], device=embeds.device) if mask is None else mask))
        length = -(-max(embeds.shape[1] for embeds, _ in encoded) // 512) * 512
        padded = [functional.pad(embeds, (0, 0, 0, length - embeds.shape[1])) for embeds, _ in encoded]
        masks = [functional.pad(mask, (0, length - mask.shape[1])) for _, mask in encoded]
        return {"prompt_embeds": torch.cat(padded), "prompt_embeds_mask": torch.cat(masks).bool()}

    def target_tokens(self, latents: torch.Tensor) -> ReferenceTokens:
        tokens = flat(latents)
        return ReferenceTokens(tokens, torch.tensor([[1, *latents.shape[-2:]]]).expand(tokens.shape[1], 3))

    def reference_tokens(self, latents: Sequence[torch.Tensor]) -> ReferenceTokens:
        self._shapes = [(1, *reference.shape[-2:]) for reference in latents]
        tokens = torch.cat([flat(reference) for reference in latents], dim=1)
        return ReferenceTokens(tokens, torch.arange(tokens.shape[1])[:, None])

    def overview_tokens(
        self,
        latents: Sequence[torch.Tensor],
        references: ReferenceTokens,
        grids: Sequence[Grid],
        overviews: Mapping[int, Overview],
    ) -> ReferenceTokens:
        rows, shapes = place_overviews(grids, overviews)
        self._shapes = [*((1, *grid) for grid in grids), *shapes]
        tokens = torch.cat([flat(overview) for overview in latents], dim=1)
        return ReferenceTokens(tokens, rows[:, None])

    def velocity(
        self,
        noisy: ReferenceTokens,
        sigma: torch.Tensor,
        text: Text,
        references: ReferenceTokens,
        teacher: bool = False,
    ) -> torch.Tensor:
        dtype = self.transformer.dtype
        kept = KeptTokens(references.ids[:, 0], (1, 1, len(references)), self._shapes)
        with taking_kept_tokens(self.transformer):
            velocity = self.transformer(
                hidden_states=torch.cat([noisy.latents, references.latents], dim=1).to(dtype),
                encoder_hidden_states=text["prompt_embeds"].to(dtype),
                encoder_hidden_states_mask=text["prompt_embeds_mask"],
                timestep=sigma,
                img_shapes=[[tuple(noisy.ids[0].tolist())]] * len(noisy.latents),
                attention_kwargs={KEY: kept},
                return_dict=False,
            )[0]
        return velocity[:, : len(noisy)]
