"""Where attention heads are to look, which a composed scene knows."""

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import nn

COPYING = ((4, 3), (5, 2), (6, 3))
"""The heads (single block, head) that are taught where to look. Those that did best by themselves in an earlier run."""


@contextlib.contextmanager
def watched_heads(transformer, heads: Sequence[tuple[int, int]]) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Within, a forward pass leaves the normed queries and keys of `heads` in the list: (B, tokens, d) each.

    They come in the order of the blocks, and are made anew from what a block is given: what a block does inside may be
    compiled, and not to be looked into.
    """
    from diffusers.models.transformers.transformer_flux2 import Flux2Modulation

    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []

    def look(block, _, inputs: dict[str, torch.Tensor], head: int) -> None:
        attention = block.attn
        shift, scale, _ = Flux2Modulation.split(inputs["temb_mod"], 1)[0]
        hidden = (1 + scale) * block.norm(inputs["hidden_states"]) + shift
        of_query, of_key, *_ = attention.to_qkv_mlp_proj.weight.split(attention.inner_dim)
        rows = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
        query, key = (nn.functional.linear(hidden, weight[rows]) for weight in (of_query, of_key))
        pairs.append((attention.norm_q(query), attention.norm_k(key)))

    with contextlib.ExitStack() as hooks:
        for number, head in heads:
            block = transformer.single_transformer_blocks[number]
            handle = block.register_forward_pre_hook(partial(look, head=head), with_kwargs=True)
            hooks.callback(handle.remove)
        yield pairs


def attention_scores(
    query: torch.Tensor, key: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], rows: slice
) -> torch.Tensor:
    """The scores of the tokens `rows` for all tokens, float32 (B, rows, tokens), before the softmax.

    query, key: (B, tokens, d) of one head, before RoPE. rotary: the cosines and sines of all tokens.
    """
    from diffusers.models.embeddings import apply_rotary_emb

    query, key = (apply_rotary_emb(part[:, :, None], rotary, sequence_dim=1)[:, :, 0] for part in (query, key))
    return (torch.bmm(query[:, rows], key.transpose(1, 2)) * query.shape[-1] ** -0.5).float()


def correspondence_loss(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
    rotary: tuple[torch.Tensor, torch.Tensor],
    source: torch.Tensor,
    text_tokens: int,
) -> torch.Tensor:
    """Cross-entropy of where heads look, against the reference token that each output token shows (`Scene.source`).

    pairs: what `watched_heads` saw; rotary: the cosines and sines of all tokens; source: int64 (B, output tokens), on
    the CPU so that no device is waited for. -1 is a token that shows nothing of a reference: it should look at anything
    but references, so that clutter beside an object stays behind. Samples of -1 alone teach nothing; else the two kinds
    of tokens weigh the same. Found from the pictures alone, an object that moves costs several times as many samples:
    nothing pulls a head to the right token until it already looks there.
    """
    first = text_tokens + source.shape[1]  # token of the references
    known = (source >= 0).any(1, keepdim=True)
    which, where = (source >= 0).nonzero(as_tuple=True)
    truth = source[which, where] + first
    bare = (known & (source < 0)).nonzero(as_tuple=True)
    losses = []
    for query, key in pairs:
        looks = attention_scores(query, key, rotary, slice(text_tokens, first)).log_softmax(-1)
        losses.append(-looks[which, where, truth].mean())
        if len(bare[0]):
            losses[-1] = losses[-1] - looks[bare][:, :first].logsumexp(-1).mean()
    return torch.stack(losses).mean()
