"""FLUX.2 as the trainer sees it."""

import inspect
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from PIL import Image

from ...overview import Overview
from ...selectors.cells import Grid
from ...tokens import ReferenceTokens
from ..host import ATTENTION, Head, Host, Looks, Text
from .drop import place_overviews
from .heads import watched_heads
from .kv import in_kv_mode


class Flux2(Host):
    """FLUX.2 dev, klein and klein-KV.

    `kv` trains what `Flux2KleinKVPipeline` runs: references come before the output and attend only to themselves, at
    noise level 0, so that their keys and values hold for every step. That takes the KV attention processors (with the
    plain ones the transformer merely warns and attends fully); building that pipeline sets them. The teacher is the
    model as it was published: plain klein attends fully, and a KV model is its own teacher in KV mode.
    """

    has_kv = True

    def __init__(self, pipe: Any, settings: Mapping[str, Any], kv: bool = False) -> None:
        from diffusers import Flux2KleinKVPipeline, Flux2Pipeline

        if kv and isinstance(pipe, Flux2Pipeline):
            raise ValueError("KV mode is for klein models: FLUX.2 dev has no pipeline that runs it.")
        self._published_kv = isinstance(pipe, Flux2KleinKVPipeline)
        if kv and not self._published_kv:
            pipe = in_kv_mode(pipe)
        super().__init__(pipe, settings, kv or self._published_kv)

    def lora_targets(self) -> list[str]:
        """Those of diffusers' training scripts for FLUX.2: all attention, the single blocks' fused MLPs with it."""
        singles = range(len(self.transformer.single_transformer_blocks))
        fused = ["to_qkv_mlp_proj", *(f"single_transformer_blocks.{i}.attn.to_out" for i in singles)]
        return [*ATTENTION, *fused]

    def check_heads(self, heads: Sequence[Head]) -> None:
        blocks = self.transformer.single_transformer_blocks
        count = self.transformer.config.num_attention_heads
        for block, head in heads:
            if block >= len(blocks) or head >= count:
                raise ValueError(
                    f"teach_heads has {block}.{head}, but the transformer has {len(blocks)} single blocks of {count} "
                    "heads, which are counted from 0: name others."
                )

    def watch_heads(self, heads: Sequence[Head]) -> AbstractContextManager[Looks]:
        return watched_heads(self.transformer, heads, references_first=self.kv)

    def pixels(self, picture: Image.Image) -> torch.Tensor:
        width, height = (side // self.token * self.token for side in picture.size)
        return self.pipe.image_processor.preprocess(picture, height=height, width=width, resize_mode="crop")

    @torch.no_grad()
    def encode_pictures(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.vae_latents(pixels)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str], pictures: Sequence[Sequence[Image.Image]]) -> Text:
        parameters = inspect.signature(self.pipe.encode_prompt).parameters
        settings = {name: value for name, value in self.settings.items() if name in parameters}
        embeds, _ = self.pipe.encode_prompt(list(prompts), device=self.pipe.text_encoder.device, **settings)
        return {"prompt_embeds": embeds}

    def target_tokens(self, latents: torch.Tensor) -> ReferenceTokens:
        ids = self.pipe._prepare_latent_ids(latents).to(latents.device)
        return ReferenceTokens(self.pipe._pack_latents(latents), ids)

    def reference_tokens(self, latents: Sequence[torch.Tensor]) -> ReferenceTokens:
        ids = self.pipe._prepare_image_ids([reference[:1] for reference in latents])
        packed = torch.cat([self.pipe._pack_latents(reference) for reference in latents], dim=1)
        return ReferenceTokens(packed, ids.repeat(len(packed), 1, 1).to(packed.device))

    def overview_tokens(
        self,
        latents: Sequence[torch.Tensor],
        references: ReferenceTokens,
        grids: Sequence[Grid],
        overviews: Mapping[int, Overview],
    ) -> ReferenceTokens:
        return place_overviews(self.reference_tokens(latents), references.ids, grids, overviews)

    def velocity(
        self,
        noisy: ReferenceTokens,
        sigma: torch.Tensor,
        text: Text,
        references: ReferenceTokens,
        teacher: bool = False,
    ) -> torch.Tensor:
        embeds = text["prompt_embeds"]
        extract = (self._published_kv if teacher else self.kv) and len(references) > 0
        order = [references, noisy] if extract else [noisy, references]
        mode = {"kv_cache_mode": "extract", "num_ref_tokens": len(references)} if extract else {}
        velocity = self.transformer(
            hidden_states=torch.cat([part.latents for part in order], dim=1).to(self.transformer.dtype),
            encoder_hidden_states=embeds.to(self.transformer.dtype),
            timestep=sigma,
            guidance=self.guidance(len(noisy.latents), sigma.device),
            img_ids=torch.cat([part.ids for part in order], dim=1),
            txt_ids=self.pipe._prepare_text_ids(embeds).to(embeds.device),
            return_dict=False,
            **mode,
        )[0]
        return velocity[:, : len(noisy)]
