"""FLUX.3 as the trainer sees it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from ...overview import Overview
from ...selectors.cells import Grid
from ...tokens import ReferenceTokens
from ..host import Host, Text, flat
from .drop import place_overviews

IMAGE_ROPE_SCALE = 0.5  # FLUX.3's rows and columns in its position ids, as its steps have it by default


class Flux3(Host):
    """FLUX.3, the base model; the distilled one is a flow map, which this loss does not train.

    Pictures are scaled and cropped as the pipeline does it with several references: to a megapixel at most. Position
    ids are (N, 4) and shared by the batch. A batch needs prompts of one padded length (a multiple of 80 tokens).
    """

    def pixels(self, picture: Image.Image) -> torch.Tensor:
        return self.pipe.image_processor.preprocess(picture, resize_mode="crop")[0]

    def _run(self, step: Any, **values: Any) -> Any:
        """The state after one of the pipeline's own steps, from these values."""
        from diffusers.modular_pipelines.modular_pipeline import PipelineState

        state = PipelineState()
        for name, value in values.items():
            state.set(name, value)
        step(self.pipe, state)
        return state

    def encode_pictures(self, pixels: torch.Tensor) -> torch.Tensor:
        from diffusers.modular_pipelines.flux3.encoders import Flux3VaeEncoderStep

        return self._run(Flux3VaeEncoderStep(), condition_images=[pixels]).image_cond_latents[0]

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str], pictures: Sequence[Sequence[Image.Image]]) -> Text:
        from diffusers.modular_pipelines.flux3.encoders import Flux3TextEncoderStep

        names = ("max_sequence_length", "text_encoder_out_layers")
        settings = {name: self.settings[name] for name in names if name in self.settings}
        step = Flux3TextEncoderStep()
        embeds = [self._run(step, prompt=prompt, negative_prompt=None, **settings).prompt_embeds for prompt in prompts]
        if len({prompt.shape for prompt in embeds}) > 1:
            raise ValueError(
                "The prompts of a batch have several padded lengths, which FLUX.3 does not mix: pass "
                "train_batch_size=1."
            )
        return {"prompt_embeds": torch.cat(embeds)}

    def target_tokens(self, latents: torch.Tensor) -> ReferenceTokens:
        from diffusers.modular_pipelines.flux3.before_denoise import _prepare_image_ids

        ids = _prepare_image_ids(*latents.shape[-2:], IMAGE_ROPE_SCALE)
        return ReferenceTokens(flat(latents), ids.to(latents.device))

    def reference_tokens(self, latents: Sequence[torch.Tensor]) -> ReferenceTokens:
        from diffusers.modular_pipelines.flux3.before_denoise import Flux3PrepareImageCondLatentsStep

        step = Flux3PrepareImageCondLatentsStep(IMAGE_ROPE_SCALE)
        state = self._run(step, image_cond_latents=list(latents), dtype=latents[0].dtype)
        return ReferenceTokens(state.image_cond_hidden_states, state.image_cond_ids)

    def overview_tokens(
        self,
        latents: Sequence[torch.Tensor],
        references: ReferenceTokens,
        grids: Sequence[Grid],
        overviews: Mapping[int, Overview],
    ) -> ReferenceTokens:
        return place_overviews(self.reference_tokens(latents).latents, references.ids, grids, overviews)

    def velocity(
        self,
        noisy: ReferenceTokens,
        sigma: torch.Tensor,
        text: Text,
        references: ReferenceTokens,
        teacher: bool = False,
    ) -> torch.Tensor:
        from diffusers.modular_pipelines.flux3.before_denoise import Flux3TextRoPEInputsStep

        dtype, embeds = self.transformer.dtype, text["prompt_embeds"]
        txt_ids = Flux3TextRoPEInputsStep._prepare_text_ids(embeds).to(embeds.device)
        seen = {"image_cond_hidden_states": references.latents.to(dtype), "image_cond_ids": references.ids}
        return self.transformer(
            hidden_states=noisy.latents.to(dtype),
            encoder_hidden_states=embeds.to(dtype),
            timestep=sigma,
            img_ids=noisy.ids,
            txt_ids=txt_ids,
            return_dict=False,
            **(seen if len(references) else {}),
        )[0]
