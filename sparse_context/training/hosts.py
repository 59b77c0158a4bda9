"""The interface by which the trainer reaches a family of pipelines: encode pictures and prompts, and predict.

A host knows what its pipeline does around the transformer, and nothing of training: which pixels the VAE gets, which
position ids tokens have, and in which order they go in. Everything is done with the pipeline's own methods. To add a
family, write a class with the methods of `Host` and give each of its pipelines a line in `HOSTS`.
"""

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from PIL import Image
from torch import nn
from torch.nn import functional

from ..families.qwen_image_edit import KEY, KeptTokens, taking_kept_tokens
from ..generation import call_settings
from ..tokens import ReferenceTokens

Text = dict[str, torch.Tensor]
"""What a host makes of prompts; the first axis of each tensor is the batch."""


GUIDANCE = 3.5  # what diffusers' own script trains FLUX.2 dev with, whose guidance is distilled


ATTENTION = ["to_k", "to_q", "to_v", "to_out.0"]  # what diffusers' own scripts adapt by default
IMAGE_ROPE_SCALE = 0.5  # FLUX.3's rows and columns in its position ids, as its steps have it by default


class Host(Protocol):
    """One family of pipelines, as the trainer sees it. Shapes: B samples, tokens of C channels, A axes of positions."""

    pipe: Any
    """The pipeline; validation calls it. In KV mode it is one that caches."""

    transformer: nn.Module
    """What is trained. With an adapter on it, `transformer.disable_adapters()` gives the base."""

    token: int
    """Pixels a side of a token."""

    shift: float
    """How far noise levels move towards noise, as the scheduler's own `shift`; 1 leaves them."""

    text_sees_references: bool
    """Whether `encode_text` looks at the pictures. If not, what it makes of a prompt serves all that have it."""

    def lora_targets(self) -> list[str]:
        """The modules of the transformer that LoRA adapts by default."""

    def pixels(self, picture: Image.Image) -> torch.Tensor:
        """A picture as the pipeline hands it to its VAE: float32 (1, 3, H, W) in [-1, 1], resized and cropped by it.

        Asked ahead of the steps, by another thread: with a copy of the pipeline's processor, for validation in the
        meantime takes notes of what passes through the pipeline's own (`families/`).
        """

    def encode_pictures(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H, W) -> latents (B, C, rows, columns), one cell a token, as the transformer wants them."""

    def encode_text(self, prompts: Sequence[str], pictures: Sequence[Sequence[Image.Image]]) -> Text:
        """What the transformer gets of prompts. `pictures` has each sample's references, for encoders that see them."""

    def target_tokens(self, latents: torch.Tensor) -> ReferenceTokens:
        """Latents (B, C, rows, columns) of the output -> its tokens and their position ids."""

    def reference_tokens(self, latents: Sequence[torch.Tensor]) -> ReferenceTokens:
        """Latents of each reference, (B, C, rows, columns) of any sizes -> all tokens, one reference after another."""

    def velocity(
        self,
        noisy: ReferenceTokens,
        sigma: torch.Tensor,
        text: Text,
        references: ReferenceTokens,
        teacher: bool = False,
    ) -> torch.Tensor:
        """The transformer's velocity on the output tokens, (B, N, C), at noise levels `sigma` (B,) in [0, 1].

        `references` has the tokens that are kept. `teacher` asks for the plain forward where training uses another one
        (KV mode).
        """


class Flux2:
    """FLUX.2 dev, klein and klein-KV.

    `kv` trains what `Flux2KleinKVPipeline` runs: references come before the output and attend only to themselves, at
    noise level 0, so that their keys and values hold for every step. That takes the KV attention processors (with the
    plain ones the transformer merely warns and attends fully); building that pipeline sets them.
    """

    text_sees_references = False

    def __init__(self, pipe: Any, kv: bool = False) -> None:
        from diffusers import Flux2KleinKVPipeline, Flux2Pipeline

        if kv and isinstance(pipe, Flux2Pipeline):
            raise ValueError("KV mode is for klein models: FLUX.2 dev has no pipeline that runs it.")
        self._settings = call_settings(pipe)
        if kv and not isinstance(pipe, Flux2KleinKVPipeline):
            parts = inspect.signature(Flux2KleinKVPipeline.__init__).parameters
            path = getattr(pipe.config, "_name_or_path", None)
            pipe = Flux2KleinKVPipeline(**{name: part for name, part in pipe.components.items() if name in parts})
            pipe.register_to_config(_name_or_path=path)  # where `generation.call_settings` looks
        self.pipe, self.kv = pipe, kv or isinstance(pipe, Flux2KleinKVPipeline)
        self.transformer: Any = pipe.transformer
        self.token = 2 * pipe.vae_scale_factor
        self.shift = float(pipe.scheduler.config.shift)
        self._processor = copy.copy(pipe.image_processor)

    def lora_targets(self) -> list[str]:
        """Those of diffusers' training scripts for FLUX.2: all attention, the single blocks' fused MLPs with it."""
        singles = range(len(self.transformer.single_transformer_blocks))
        fused = ["to_qkv_mlp_proj", *(f"single_transformer_blocks.{i}.attn.to_out" for i in singles)]
        return ["to_k", "to_q", "to_v", "to_out.0", *fused]

    def pixels(self, picture: Image.Image) -> torch.Tensor:
        width, height = (side // self.token * self.token for side in picture.size)
        return self._processor.preprocess(picture, height=height, width=width, resize_mode="crop")

    @torch.no_grad()
    def encode_pictures(self, pixels: torch.Tensor) -> torch.Tensor:
        vae = self.pipe.vae
        return self.pipe._encode_vae_image(pixels.to(vae.device, vae.dtype), generator=None)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str], pictures: Sequence[Sequence[Image.Image]]) -> Text:
        taken = inspect.signature(self.pipe.encode_prompt).parameters
        settings = {name: value for name, value in self._settings.items() if name in taken}
        embeds, _ = self.pipe.encode_prompt(list(prompts), device=self.pipe.text_encoder.device, **settings)
        return {"prompt_embeds": embeds}

    def target_tokens(self, latents: torch.Tensor) -> ReferenceTokens:
        ids = self.pipe._prepare_latent_ids(latents).to(latents.device)
        return ReferenceTokens(self.pipe._pack_latents(latents), ids)

    def reference_tokens(self, latents: Sequence[torch.Tensor]) -> ReferenceTokens:
        ids = self.pipe._prepare_image_ids([reference[:1] for reference in latents])
        packed = torch.cat([self.pipe._pack_latents(reference) for reference in latents], dim=1)
        return ReferenceTokens(packed, ids.repeat(len(packed), 1, 1).to(packed.device))

    def velocity(
        self,
        noisy: ReferenceTokens,
        sigma: torch.Tensor,
        text: Text,
        references: ReferenceTokens,
        teacher: bool = False,
    ) -> torch.Tensor:
        embeds = text["prompt_embeds"]
        extract = self.kv and not teacher and len(references) > 0
        order = [references, noisy] if extract else [noisy, references]
        mode = {"kv_cache_mode": "extract", "num_ref_tokens": len(references)} if extract else {}
        guidance = None
        if getattr(self.transformer.config, "guidance_embeds", False):
            guidance = torch.full([len(noisy.latents)], GUIDANCE, device=sigma.device)
        velocity = self.transformer(
            hidden_states=torch.cat([part.latents for part in order], dim=1).to(self.transformer.dtype),
            encoder_hidden_states=embeds.to(self.transformer.dtype),
            timestep=sigma,
            guidance=guidance,
            img_ids=torch.cat([part.ids for part in order], dim=1),
            txt_ids=self.pipe._prepare_text_ids(embeds).to(embeds.device),
            return_dict=False,
            **mode,
        )[0]
        return velocity[:, : len(noisy)]


class Kontext:
    """FLUX.1 Kontext: one reference. Pictures are scaled to one of the pipeline's shapes, of about a megapixel.

    Position ids are (N, 3) and shared by the batch; axis 0 is 0 for the output and 1 for the reference.
    """

    text_sees_references = False

    def __init__(self, pipe: Any, kv: bool = False) -> None:
        _refuse_kv(pipe, kv)
        self.pipe, self.transformer, self.token = pipe, pipe.transformer, 2 * pipe.vae_scale_factor
        self._processor = copy.copy(pipe.image_processor)
        self.shift = float(pipe.scheduler.config.shift)
        self._settings = call_settings(pipe)

    def lora_targets(self) -> list[str]:
        return ATTENTION

    def pixels(self, picture: Image.Image) -> torch.Tensor:
        from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS

        aspect = picture.width / picture.height
        shape = min(PREFERRED_KONTEXT_RESOLUTIONS, key=lambda shape: abs(aspect - shape[0] / shape[1]))
        width, height = (side // self.token * self.token for side in shape)
        resized = self._processor.resize(picture, height, width)
        return self._processor.preprocess(resized, height, width)

    @torch.no_grad()
    def encode_pictures(self, pixels: torch.Tensor) -> torch.Tensor:
        vae = self.pipe.vae
        latents = self.pipe._encode_vae_image(pixels.to(vae.device, vae.dtype), generator=None)
        return functional.pixel_unshuffle(latents, 2)  # the channel order of the pipeline's own packing

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str], pictures: Sequence[Sequence[Image.Image]]) -> Text:
        length = {"max_sequence_length": self._settings.get("max_sequence_length", 512)}
        embeds, pooled, _ = self.pipe.encode_prompt(list(prompts), None, device=self.pipe.text_encoder.device, **length)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def target_tokens(self, latents: torch.Tensor) -> ReferenceTokens:
        rows, columns = latents.shape[-2:]
        ids = self.pipe._prepare_latent_image_ids(len(latents), rows, columns, latents.device, torch.float32)
        return ReferenceTokens(_flat(latents), ids)

    def reference_tokens(self, latents: Sequence[torch.Tensor]) -> ReferenceTokens:
        if len(latents) != 1:
            raise ValueError(f"FLUX.1 Kontext takes one reference, and a sample has {len(latents)}: give each one.")
        tokens = self.target_tokens(latents[0])
        ids = tokens.ids.clone()
        ids[:, 0] = 1
        return ReferenceTokens(tokens.latents, ids)

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
        guidance = None
        if self.transformer.config.guidance_embeds:
            guidance = torch.full([len(noisy.latents)], GUIDANCE, device=sigma.device)
        velocity = self.transformer(
            hidden_states=torch.cat([noisy.latents, references.latents], dim=1).to(dtype),
            encoder_hidden_states=embeds,
            pooled_projections=text["pooled_prompt_embeds"].to(dtype),
            timestep=sigma,
            guidance=guidance,
            img_ids=torch.cat([noisy.ids, references.ids]),
            txt_ids=torch.zeros(embeds.shape[1], 3, device=embeds.device),
            return_dict=False,
        )[0]
        return velocity[:, : len(noisy)]


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


class Flux3:
    """FLUX.3, the base model; the distilled one is a flow map, which this loss does not train.

    Pictures are scaled and cropped as the pipeline does it with several references: to a megapixel at most. Position
    ids are (N, 4) and shared by the batch. A batch needs prompts of one padded length (a multiple of 80 tokens).
    """

    text_sees_references = False

    def __init__(self, pipe: Any, kv: bool = False) -> None:
        _refuse_kv(pipe, kv)
        self.pipe, self.transformer, self.token = pipe, pipe.transformer, 2 * pipe.vae_scale_factor
        self._processor = copy.copy(pipe.image_processor)
        self.shift = float(pipe.scheduler.config.shift)
        self._settings = call_settings(pipe)

    def lora_targets(self) -> list[str]:
        return ATTENTION

    def pixels(self, picture: Image.Image) -> torch.Tensor:
        return self._processor.preprocess(picture, resize_mode="crop")[0]

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
        settings = {name: self._settings[name] for name in names if name in self._settings}
        step = Flux3TextEncoderStep()
        embeds = [self._run(step, prompt=prompt, negative_prompt=None, **settings).prompt_embeds for prompt in prompts]
        if len({one.shape for one in embeds}) > 1:
            raise ValueError("The prompts of a batch have several padded lengths, which FLUX.3 does not mix: batch 1.")
        return {"prompt_embeds": torch.cat(embeds)}

    def target_tokens(self, latents: torch.Tensor) -> ReferenceTokens:
        from diffusers.modular_pipelines.flux3.before_denoise import _prepare_image_ids

        ids = _prepare_image_ids(*latents.shape[-2:], IMAGE_ROPE_SCALE)
        return ReferenceTokens(_flat(latents), ids.to(latents.device))

    def reference_tokens(self, latents: Sequence[torch.Tensor]) -> ReferenceTokens:
        from diffusers.modular_pipelines.flux3.before_denoise import Flux3PrepareImageCondLatentsStep

        step = Flux3PrepareImageCondLatentsStep(IMAGE_ROPE_SCALE)
        state = self._run(step, image_cond_latents=list(latents), dtype=latents[0].dtype)
        return ReferenceTokens(state.image_cond_hidden_states, state.image_cond_ids)

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


def _flat(latents: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, rows, columns) as tokens (B, rows * columns, C)."""
    return latents.flatten(2).transpose(1, 2)


def _refuse_kv(pipe: Any, kv: bool) -> None:
    if kv:
        raise ValueError(f"KV mode is for FLUX.2 klein: {type(pipe).__name__} has no pipeline that runs it.")


HOSTS: Mapping[str, Callable[[Any, bool], Host]] = {
    "Flux2Pipeline": Flux2,
    "Flux2KleinPipeline": Flux2,
    "Flux2KleinKVPipeline": Flux2,
    "FluxKontextPipeline": Kontext,
    "QwenImageEditPlusPipeline": QwenImageEditPlus,
    "Flux3ModularPipeline": Flux3,
}


def find_host(pipe: Any, kv: bool = False) -> Host:
    """The host of a pipeline, by its class. Raises ValueError that names the pipelines that can be trained.

    `kv` asks for KV mode; a host whose family has none raises ValueError.
    """
    name = type(pipe).__name__
    if name not in HOSTS:
        raise ValueError(f"{name} cannot be trained here; the pipelines that can are {', '.join(HOSTS)}.")
    return HOSTS[name](pipe, kv)
