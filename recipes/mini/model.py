"""The embedded model's parts, untrained: real diffusers and transformers classes at a size that a laptop trains.

One token stands for 8x8 pixels: the VAE divides by 4, the 2x2 packing by 2. So 128x128 pixels are 256 tokens.
"""

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

TEXT_LENGTH = 32
TEXT_LAYERS = (2,)
TEXT_WIDTH = 128
LATENT_CHANNELS = 8
CHAT_TEMPLATE = "{% for message in messages %}{{ '<|im_start|>' + message['content'] + '<|im_end|>' }}{% endfor %}"


def make_vae() -> AutoencoderKLFlux2:
    """0.9 M parameters, pixels divided by 4, 8 latent channels; `bn` has what the pipeline normalises latents with."""
    return AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=16,
        sample_size=128,
        mid_block_add_attention=False,
    )


def make_transformer() -> Flux2Transformer2DModel:
    """11 M parameters: width 256, 2 double and 8 single blocks."""
    return Flux2Transformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=8,
        attention_head_dim=64,
        num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH * len(TEXT_LAYERS),
        axes_dims_rope=(8, 24, 24, 8),
        rope_theta=200,
        guidance_embeds=False,
    )


def make_tokenizer(corpus: list[str], vocabulary: int = 512) -> Qwen2Tokenizer:
    """A byte-level BPE of the Qwen2 kind, trained on `corpus`; any Unicode text can be encoded."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        corpus, vocab_size=vocabulary, new_special_tokens=special[1:], show_progress=False
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen3ForCausalLM:
    """0.5 M parameters: 2 layers of width 128."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=3 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=32,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """A fixed shift: with dynamic shifting at 256 tokens the last of 8 steps would jump from sigma 0.49 to 0."""
    return FlowMatchEulerDiscreteScheduler(shift=2.0, use_dynamic_shifting=False)


def make_pipeline(vae, transformer, text_encoder, tokenizer) -> Flux2KleinPipeline:
    """The parts as one pipeline; `is_distilled` because the model is trained without a null prompt to guide against."""
    return Flux2KleinPipeline(
        scheduler=make_scheduler(),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
        is_distilled=True,
    )


@torch.no_grad()
def encode_pictures(vae: AutoencoderKLFlux2, pictures: torch.Tensor) -> torch.Tensor:
    """Pixels (B, 3, H, W) in [-1, 1] -> normalised latents (B, 32, H/8, W/8), as the pipeline makes them."""
    latents = Flux2KleinPipeline._patchify_latents(vae.encode(pictures).latent_dist.mode())
    mean, var = vae.bn.running_mean.view(1, -1, 1, 1), vae.bn.running_var.view(1, -1, 1, 1)
    return (latents - mean) / torch.sqrt(var + vae.config.batch_norm_eps)


@torch.no_grad()
def decode_pictures(vae: AutoencoderKLFlux2, latents: torch.Tensor) -> torch.Tensor:
    """Normalised latents (B, 32, rows, columns) -> pixels (B, 3, 8 * rows, 8 * columns) in [-1, 1]."""
    mean, var = vae.bn.running_mean.view(1, -1, 1, 1), vae.bn.running_var.view(1, -1, 1, 1)
    clean = latents * torch.sqrt(var + vae.config.batch_norm_eps) + mean
    return vae.decode(Flux2KleinPipeline._unpatchify_latents(clean)).sample
