"""Kontext and LongCat as the trainer sees them."""

from collections.abc import Mapping, Sequence

import torch
from PIL import Image
from torch.nn import functional

from ...overview import Overview
from ...selectors.cells import Grid
from ...tokens import ReferenceTokens
from ..host import Host, Text, flat
from .drop import place_overviews


class Kontext(Host):
    """FLUX.1 Kontext: one reference. Pictures are scaled to one of the pipeline's shapes, of about a megapixel.

    Position ids are (N, 3) and shared by the batch; axis 0 is 0 for the output and 1 for the reference.
    """

    def pixels(self, picture: Image.Image) -> torch.Tensor:
        from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS

        aspect = picture.width / picture.height
        shape = min(PREFERRED_KONTEXT_RESOLUTIONS, key=lambda shape: abs(aspect - shape[0] / shape[1]))
        width, height = (side // self.token * self.token for side in shape)
        resized = self.pipe.image_processor.resize(picture, height, width)
        return self.pipe.image_processor.preprocess(resized, height, width)

    @torch.no_grad()
    def encode_pictures(self, pixels: torch.Tensor) -> torch.Tensor:
        # The channel order of the pipeline's own packing
        return functional.pixel_unshuffle(self.vae_latents(pixels), 2)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str], pictures: Sequence[Sequence[Image.Image]]) -> Text:
        length = {"max_sequence_length": self.settings.get("max_sequence_length", 512)}
        embeds, pooled, _ = self.pipe.encode_prompt(list(prompts), None, device=self.pipe.text_encoder.device, **length)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def target_tokens(self, latents: torch.Tensor) -> ReferenceTokens:
        rows, columns = latents.shape[-2:]
        ids = self.pipe._prepare_latent_image_ids(len(latents), rows, columns, latents.device, torch.float32)
        return ReferenceTokens(flat(latents), ids)

    def reference_tokens(self, latents: Sequence[torch.Tensor]) -> ReferenceTokens:
        if len(latents) != 1:
            raise ValueError(f"FLUX.1 Kontext takes one reference, and a sample has {len(latents)}: give each one.")
        tokens = self.target_tokens(latents[0])
        ids = tokens.ids.clone()
        ids[:, 0] = 1
        return ReferenceTokens(tokens.latents, ids)

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
        dtype = self.transformer.dtype
        embeds = text["prompt_embeds"].to(dtype)
        velocity = self.transformer(
            hidden_states=torch.cat([noisy.latents, references.latents], dim=1).to(dtype),
            encoder_hidden_states=embeds,
            pooled_projections=text["pooled_prompt_embeds"].to(dtype),
            timestep=sigma,
            guidance=self.guidance(len(noisy.latents), sigma.device),
            img_ids=torch.cat([noisy.ids, references.ids]),
            txt_ids=torch.zeros(embeds.shape[1], 3, device=embeds.device),
            return_dict=False,
        )[0]
        return velocity[:, : len(noisy)]
