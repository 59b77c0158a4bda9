"""Where attention heads of FLUX.2's single blocks look."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb

from ..host import Head, Looks


@contextlib.contextmanager
def watched_heads(transformer: Any, heads: Sequence[Head], references_first: bool) -> Iterator[Looks]:
    """Within it, a forward of the transformer is watched; what it gives says where `heads` looked, also afterwards.

    references_first: whether the transformer sees them before the output's tokens. Nothing is computed inside of a
    block: with gradient checkpointing that would be missed when the block runs again.
    """
    parts: dict[tuple[int, str], Any] = {}  # of a block: queries and keys (B, tokens, heads, d), and rotary rows

    def looks(outputs: int, references: int) -> list[torch.Tensor]:
        if len(parts) < 3 * len({block for block, _ in heads}):
            raise ValueError(
                "The transformer's blocks do not show where their heads look, as compiled ones do not: leave compiling "
                "or teach out."
            )
        found = []
        for block, head in heads:
            query, key = (_turned(parts[block, name], parts[block, "rotary"], head) for name in ("query", "key"))
            text = key.shape[1] - outputs - references
            output, first = (text + references, text) if references_first else (text, text + outputs)
            scores = torch.bmm(query[:, output : output + outputs], key.transpose(1, 2)) * query.shape[-1] ** -0.5
            before, shown, behind = (
                scores.float().log_softmax(-1).split([first, references, scores.shape[-1] - first - references], dim=-1)
            )
            elsewhere = torch.cat([before, behind], dim=-1).logsumexp(-1, keepdim=True)
            found.append(torch.cat([elsewhere, shown], dim=-1))
        return found

    with contextlib.ExitStack() as hooks:
        for block in {block for block, _ in heads}:
            attention = transformer.single_transformer_blocks[block].attn

            def note_rotary(module: Any, args: Any, kwargs: Any, block: int = block) -> None:
                parts[block, "rotary"] = kwargs["image_rotary_emb"]

            hooks.callback(attention.register_forward_pre_hook(note_rotary, with_kwargs=True).remove)
            for name, norm in (("query", attention.norm_q), ("key", attention.norm_k)):

                def note(module: Any, args: Any, normed: torch.Tensor, key: tuple[int, str] = (block, name)) -> None:
                    parts[key] = normed

                hooks.callback(norm.register_forward_hook(note).remove)
        yield looks


def _turned(part: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], head: int) -> torch.Tensor:
    """The queries or keys of one head with RoPE, (B, tokens, d), of those of all without, (B, tokens, heads, d)."""
    return apply_rotary_emb(part[:, :, head : head + 1], rotary, sequence_dim=1)[:, :, 0]
