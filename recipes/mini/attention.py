"""FLUX.2's single blocks at a CPU's speed: what lies between their matrix products, as two compiled kernels.

In bfloat16 on a CPU with matrix units, the products of a block take less time than the norms, rotations, casts and
copies between them, which diffusers runs one by one. Here a processor of the block's attention, which diffusers lets
one set, does the same in one pass over memory: q and k normed and rotated, all three laid out for the attention, the
gated MLP beside it. The results are the host's, but for the rounding of one cast.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention, silu

from sparse_context.training.attention import LARGEST, attend


def _norm_and_rotate(x: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """(B, tokens, heads, d) -> (B, heads, tokens, d): RMS norm, then rotary position embedding, in float32."""
    y = x.float()
    y = (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6) * weight).to(x.dtype).float()
    pairs = y.unflatten(-1, (-1, 2))
    turned = torch.stack((-pairs[..., 1], pairs[..., 0]), -1).flatten(-2)
    return (y * cos[None, :, None] + turned * sin[None, :, None]).to(x.dtype).transpose(1, 2).contiguous()


def _split(
    projected: torch.Tensor,
    of_query: torch.Tensor,
    of_key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads: int,
    size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a block's one projection holds: q, k, v (B, heads, tokens, d), and the gated MLP (B, tokens, width)."""
    inner = heads * size
    query, key, value = (part.unflatten(-1, (heads, size)) for part in projected[..., : 3 * inner].chunk(3, -1))
    gate, up = projected[..., 3 * inner :].chunk(2, -1)
    mixed = (silu(gate.float()) * up.float()).to(projected.dtype)
    query, key = _norm_and_rotate(query, of_query, cos, sin), _norm_and_rotate(key, of_key, cos, sin)
    return query, key, value.transpose(1, 2).contiguous(), mixed


@cache
def _compiled_split() -> Callable:
    """Compiled when it is first asked for: that takes half a minute."""
    return torch.compile(_split, dynamic=True)


class CompiledParallelAttention:
    """In the place of diffusers' `Flux2ParallelSelfAttnProcessor`, without masks."""

    def __call__(
        self, attn: Any, hidden_states: torch.Tensor, attention_mask: None, rotary: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        projected = attn.to_qkv_mlp_proj(hidden_states)
        query, key, value, mixed = _compiled_split()(
            projected, attn.norm_q.weight, attn.norm_k.weight, *rotary, attn.heads, attn.head_dim
        )
        small = query.dtype == torch.bfloat16 and 2 * query.shape[:3].numel() * query.shape[2] <= LARGEST
        attention = attend if small else scaled_dot_product_attention
        attended = attention(query, key, value).transpose(1, 2).flatten(2)
        return attn.to_out(torch.cat([attended, mixed], -1))


def speed_up(transformer: Any) -> None:
    """Set the processor on each single block of this transformer."""
    for block in transformer.single_transformer_blocks:
        block.attn.set_processor(CompiledParallelAttention())
