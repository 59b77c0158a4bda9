"""Transformers and pipelines of a shape, with random weights."""

from typing import Any

import torch

from ..families.shape import Shape, with_blocks


def build_transformer(
    shape: Shape, device: torch.device, dtype: torch.dtype, blocks: int | None = None
) -> torch.nn.Module:
    """A transformer of this shape with random weights, drawn on the device; `blocks` of each kind in place of all."""
    with torch.device("meta"):
        transformer = shape.kind.build(shape if blocks is None else with_blocks(shape, blocks))
    return draw_weights(transformer, device, dtype)


def build_pipeline(shape: Shape, device: torch.device, dtype: torch.dtype) -> Any:
    """A pipeline of this shape, which is FLUX.2's, with random weights.

    Without an `encoder` it has no text encoder: pass `prompt_embeds`. Its tokeniser is the embedded model's, filled up
    to the same number of tokens.
    """
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Pipeline
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    from ..pipelines.embedded import WEIGHTS

    with torch.device("meta"):
        vae = AutoencoderKLFlux2()
        encoder = Qwen3ForCausalLM(Qwen3Config(**shape.encoder)) if shape.encoder else None
    parts = {
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "vae": draw_weights(vae, device, dtype).eval(),
        "text_encoder": None if encoder is None else draw_weights(encoder, device, dtype).eval(),
        "tokenizer": AutoTokenizer.from_pretrained(WEIGHTS / "tokenizer") if shape.encoder else None,
        "transformer": build_transformer(shape, device, dtype).eval(),
    }
    return Flux2Pipeline(**parts) if shape.guidance else Flux2KleinPipeline(**parts, is_distilled=True)


def draw_weights(module: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """Give a module on the meta device real weights: matrices from N(0, 0.02), norms 1, biases and statistics 0 and 1.

    Nothing passes through the CPU, and there is never a second copy. What diffusers keeps in float32, stays in it.
    """
    rotary = {name for name, _ in module.named_buffers() if name.endswith("inv_freq")}
    torch.nn.Module.to(module, dtype)  # not diffusers' own, which warns of weights that nobody has drawn yet
    exact = getattr(module, "_keep_in_fp32_modules", None) or ()
    for name, part in module.named_modules():
        if name.rpartition(".")[2] in exact:
            part.float()
    module.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.02, generator=generator)
            else:
                weight.fill_(0.0 if name.endswith("bias") else 1.0)
        for name, buffer in module.named_buffers():
            buffer.fill_(1 if name in rotary or name.endswith("running_var") else 0)
    return module
