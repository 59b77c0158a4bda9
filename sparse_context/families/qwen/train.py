"""Qwen-Image-Edit-Plus as the trainer sees it."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch.nn import functional

from ...tokens import ReferenceTokens
from ..host import ATTENTION, Text, _flat, _refuse_kv
from .drop import KEY, KeptTokens, taking_kept_tokens


class QwenImageEditPlus:
    """Qwen-Image-Edit-Plus (2509, 2511), which scales every picture to about a megapixel.

    It has no position ids, only rotary rows that follow from the shapes. So a reference token's id is the number of its
    row (N, 1), of references in the shapes of the last `reference_tokens`, and an output token's id is the output's
    shape (N, 3). Its text encoder sees the references, in a smaller size; prompts are padded to a multiple of 512.
    """

    text_sees_references = True

    def __init__(self, pipe: Any, kv: bool = False) -> None:
        _refuse_kv(pipe, kv)
        self.pipe, self.transformer, self.token = pipe, pipe.transformer, 2 * pipe.vae_scale_factor
        self._processor = copy.copy(pipe.image_processor)
        self.shift = float(pipe.scheduler.config.shift)
        self._shapes: list[tuple[int, int, int]] = []

    def lora_targets(self) -> list[str]:
        return ATTENTION

    def pixels(self, picture: Image.Image) -> torch.Tensor:
        from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as host

        width, height = host.calculate_dimensions(host.VAE_IMAGE_SIZE, picture.width / picture.height)
        return self._processor.preprocess(picture, height, width)

    @torch.no_grad()
    def encode_pictures(self, pixels: torch.Tensor) -> torch.Tensor:
        vae = self.pipe.vae
        latents = self.pipe._encode_vae_image(pixels.to(vae.device, vae.dtype).unsqueeze(2), generator=None)
        return functional.pixel_unshuffle(latents.squeeze(2), 2)  # the channel order of the pipeline's own packing

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str], pictures: Sequence[Sequence[Image.Image]]) -> Text:
        from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as host

        made = []
        for prompt, references in zip(prompts, pictures, strict=True):
            small = []
            for picture in references:
                width, height = host.calculate_dimensions(host.CONDITION_IMAGE_SIZE, picture.width / picture.height)
                small.append(self.pipe.image_processor.resize(picture, height, width))
            embeds, mask = self.pipe.encode_prompt([prompt], small, device=self.pipe.text_encoder.device)
            made.append((embeds, torch.ones(embeds.shape[:2], device=embeds.device) if mask is None else mask))
        length = -(-max(embeds.shape[1] for embeds, _ in made) // 512) * 512
        padded = [functional.pad(embeds, (0, 0, 0, length - embeds.shape[1])) for embeds, _ in made]
        masks = [functional.pad(mask, (0, length - mask.shape[1])) for _, mask in made]
        return {"prompt_embeds": torch.cat(padded), "prompt_embeds_mask": torch.cat(masks).bool()}

    def target_tokens(self, latents: torch.Tensor) -> ReferenceTokens:
        tokens = _flat(latents)
        return ReferenceTokens(tokens, torch.tensor([[1, *latents.shape[-2:]]]).expand(tokens.shape[1], 3))

    def reference_tokens(self, latents: Sequence[torch.Tensor]) -> ReferenceTokens:
        self._shapes = [(1, one.shape[-2], one.shape[-1]) for one in latents]
        tokens = torch.cat([_flat(one) for one in latents], dim=1)
        return ReferenceTokens(tokens, torch.arange(tokens.shape[1])[:, None])

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
