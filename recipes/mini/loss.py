"""Flow matching on scenes."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import Qwen2Tokenizer

from sparse_context.training.loss import noise_levels

from .model import TEXT_LAYERS, TEXT_LENGTH
from .teaching import COPYING, correspondence_loss, watched_heads


def position_ids(rows: int, columns: int, t: int) -> torch.Tensor:
    """(rows * columns, 4) int64: the pipeline's (T, H, W, L) coordinates of one picture."""
    return torch.cartesian_prod(torch.tensor([t]), torch.arange(rows), torch.arange(columns), torch.tensor([0]))


def text_ids(length: int) -> torch.Tensor:
    """(length, 4) int64: those of the prompt."""
    return torch.cartesian_prod(torch.tensor([0]), torch.tensor([0]), torch.tensor([0]), torch.arange(length))


def tokenise(tokenizer: Qwen2Tokenizer, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts -> token ids and which of them count, int64 (B, 32) each, as `Flux2KleinPipeline` makes them."""
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True)
        for p in prompts
    ]
    inputs = tokenizer(texts, return_tensors="pt", padding="max_length", truncation=True, max_length=TEXT_LENGTH)
    return inputs["input_ids"], inputs["attention_mask"]


def encode_text(text_encoder: nn.Module, ids: torch.Tensor, attends: torch.Tensor) -> torch.Tensor:
    """What `tokenise` made -> (B, 32, 128), as `Flux2KleinPipeline` makes it, but with gradients."""
    inputs = {"input_ids": ids, "attention_mask": attends}
    hidden = text_encoder.model(**inputs, output_hidden_states=True, use_cache=False).hidden_states
    return torch.cat([hidden[layer] for layer in TEXT_LAYERS], dim=-1)


TOWARDS_NOISE = 5.0
"""The shift of the noise levels in training, uniform ones. A call has more of them near the picture, but what moves is
found, or not, in its first steps: in one probe the error on an object to be placed was three times as large from pure
noise as from 0.77, where the noisy picture gives its place away; that on an object that stays was no larger."""


def flow_matching_loss(
    transformer,
    text: torch.Tensor,
    target: torch.Tensor,
    references: Sequence[torch.Tensor],
    generator: torch.Generator,
    weights: torch.Tensor | None = None,
    source: torch.Tensor | None = None,
    teach: float = 0.0,
) -> torch.Tensor:
    """Mean squared error of the velocity on the output tokens, and `teach` times the `correspondence_loss`.

    target: latents (B, C, H, W); references: latents (B, C, h, w) each; weights: of each output token, (B, H * W), or
    None for equal ones; source: as in `correspondence_loss`. `generator` draws on the CPU, so that a seed means the
    same noise on every device.
    """
    device = target.device
    rows, columns = target.shape[-2:]
    clean = target.flatten(2).transpose(1, 2)
    context = [reference.flatten(2).transpose(1, 2) for reference in references]
    u = torch.rand(len(target), generator=generator).clamp(1e-4, 1 - 1e-4)
    sigma = noise_levels(u, "none", TOWARDS_NOISE).to(device)
    noise = torch.randn(clean.shape, generator=generator).to(device)
    noisy = torch.lerp(clean, noise, sigma.view(-1, 1, 1))
    ids = [position_ids(rows, columns, 0)]
    ids += [
        position_ids(reference.shape[-2], reference.shape[-1], 10 * (i + 1)) for i, reference in enumerate(references)
    ]
    img_ids = torch.cat(ids).to(device)
    txt_ids = text_ids(text.shape[1]).to(device)
    teaching = source is not None and teach > 0 and bool((source >= 0).any())
    with watched_heads(transformer, COPYING if teaching else ()) as pairs:
        velocity = transformer(
            hidden_states=torch.cat([noisy, *context], dim=1),
            encoder_hidden_states=text,
            timestep=sigma,
            img_ids=img_ids,
            txt_ids=txt_ids,
            return_dict=False,
        )[0][:, : clean.shape[1]]
    error = (velocity.float() - (noise - clean)).square().mean(-1)
    loss = error.mean() if weights is None else (error * weights).sum() / weights.sum()
    if teaching:
        rotary = transformer.pos_embed(torch.cat([txt_ids, img_ids]))
        loss = loss + teach * correspondence_loss(pairs, rotary, source, text.shape[1])
    return loss
