"""Where heads are to look beside an overview, and what blocks and heads say: what its losses are made of."""

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from sparse_context.overview import overview_grid
from sparse_context.pipelines.overview_blocks import FIRST, NEW

from . import teaching
from .overview_sets import TokenSet
from .teaching import attention_scores

COPYING = tuple((block + NEW, head) for block, head in teaching.COPYING)
CELLS = (
    ((0, 0), (0, 3), (3, 0), (3, 3)),
    ((0, 1), (0, 2), (3, 1), (3, 2)),
    ((1, 0), (2, 0), (1, 3), (2, 3)),
    ((1, 1), (1, 2), (2, 1), (2, 2)),
)
"""For each head of each new block the cell (row, column) of those that a token of an overview by 4 covers. An overview
by 2 has the offsets of the inner ones, which come last: by then three blocks have worked on the overview's tokens."""
READING = tuple(((FIRST + block, head), cell) for block, cells in enumerate(CELLS) for head, cell in enumerate(cells))


def looking_loss(
    heads: Sequence[tuple[int, int]],
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
    rotary: tuple[torch.Tensor, torch.Tensor],
    source: torch.Tensor,
    grids: Sequence[tuple[int, int]],
    tokens: TokenSet,
    text_tokens: int,
) -> torch.Tensor:
    """Cross-entropy of where `heads` of `READING` and `COPYING` look.

    pairs: their queries and keys, as `watched_heads` saw them. source: int64 (B, output tokens), the token that each
    shows of references with `grids`, counted through all of them, -1 for none. A copying head is to look at a source
    that is sharp. A reading head is to look at the overview token that covers a source that is not, if it lies in the
    head's cell. Else they are to look at no reference.
    """
    places, cells, losses = find_sources(source, grids, tokens), dict(READING), []
    for head, pair in zip(heads, pairs, strict=True):
        wanted = places.sharp
        if head in cells:
            row, column = (axis - 1.5 for axis in cells[head])
            wanted = torch.where(places.blurred & (places.row == row) & (places.column == column), places.cover, -1)
        losses.append(look_loss(*pair, rotary, wanted, text_tokens))
    return torch.stack(losses).mean()


class Sources(NamedTuple):
    """Where the source of each output token is found among a set's tokens; all (B, output tokens).

    sharp: its own place, -1 where it is not sharp. cover: the place of the overview token that covers it. row, column:
    how far from that token's middle, in cells. blurred: whether it is shown by the overview alone.
    """

    sharp: torch.Tensor
    cover: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    blurred: torch.Tensor


def find_sources(source: torch.Tensor, grids: Sequence[tuple[int, int]], tokens: TokenSet) -> Sources:
    """The arguments are those of `looking_loss`."""
    place = torch.full((sum(rows * columns for rows, columns in grids) + 1,), -1)
    place[torch.from_numpy(tokens.kept)] = torch.arange(len(tokens.kept))
    sharp = place[source]  # -1 for none, too: the last entry
    factor = max(tokens.factor, 1)
    covers, rows, columns, first = [], [], [], len(tokens.kept)
    for grid in grids:  # of each token of the references: what covers it, and where below that it lies
        row, column = torch.arange(grid[0]).view(-1, 1), torch.arange(grid[1])
        coarse = overview_grid(grid, factor)
        covers.append(first + row // factor * coarse[1] + column // factor)
        rows.append((row % factor - (factor - 1) / 2).expand(grid))
        columns.append((column % factor - (factor - 1) / 2).expand(grid))
        first += coarse[0] * coarse[1]
    cover, row, column = (torch.cat([part.flatten() for part in parts])[source] for parts in (covers, rows, columns))
    return Sources(sharp, cover, row, column, (source >= 0) & (sharp < 0) & (tokens.factor > 0))


def look_loss(
    query: torch.Tensor, key: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], wanted: torch.Tensor, text: int
) -> torch.Tensor:
    """Cross-entropy of where one head looks: each output token at the reference token `wanted`, int64 (B, output
    tokens), or where that is -1 at none. The two kinds weigh the same. query, key: (B, tokens, d) before RoPE."""
    first = text + wanted.shape[1]  # token of the references
    scores = attention_scores(query, key, rotary, slice(text, first))
    total, seen = scores.logsumexp(-1), wanted >= 0
    found = scores.gather(-1, (wanted.clamp(min=0) + first).clamp(max=scores.shape[-1] - 1).unsqueeze(-1)).squeeze(-1)
    bare = scores[..., :first].logsumexp(-1)
    losses = ((total - found) * seen).sum() / seen.sum().clamp(min=1)
    return losses + ((total - bare) * ~seen).sum() / (~seen).sum().clamp(min=1)


def follow_loss(states: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """The mean over blocks of the squared distance of output tokens, as a share of the teacher's own square."""
    parts = []
    for state, target in zip(states, wanted, strict=True):
        error = (state.float() - target.float()).square().mean(-1)
        parts.append((error * weights).sum() / weights.sum() / target.float().square().mean())
    return torch.stack(parts).mean()


def reading_loss(added: torch.Tensor, copies: Sequence[torch.Tensor], blurred: torch.Tensor) -> torch.Tensor:
    """How far what the new blocks add is from what the teacher's copying heads do, as a share of the latter's square.

    added, each of copies: (B, output tokens, width). blurred: bool (B, output tokens), those that count.
    """
    wanted, seen = torch.stack(list(copies)).sum(0), blurred.to(added.device)
    error = ((added - wanted).square().mean(-1) * seen).sum()
    return error / (wanted.square().mean(-1) * seen).sum().clamp(min=1e-6)


# What a forward pass says ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def watched_blocks(transformer: Any, blocks: Sequence[int], tokens: slice) -> Iterator[list[torch.Tensor]]:
    """Within, a forward pass leaves what these single blocks return in the list, of `tokens` alone."""
    seen: list[torch.Tensor] = []
    with contextlib.ExitStack() as hooks:
        for number in blocks:
            block = transformer.single_transformer_blocks[number]
            handle = block.register_forward_hook(lambda module, inputs, result: seen.append(result[:, tokens]))
            hooks.callback(handle.remove)
        yield seen


@contextlib.contextmanager
def watched_copies(transformer: Any, heads: Sequence[tuple[int, int]], tokens: slice) -> Iterator[list[torch.Tensor]]:
    """Within, a forward pass leaves what `heads` (single block, head) add to `tokens`: float32 (B, tokens, width)."""
    from diffusers.models.transformers.transformer_flux2 import Flux2Modulation

    seen: list[torch.Tensor] = []
    gates: dict[int, torch.Tensor] = {}

    def note_gate(block: Any, _: Any, inputs: dict[str, torch.Tensor], number: int) -> None:
        gates[number] = Flux2Modulation.split(inputs["temb_mod"], 1)[0][2].float()

    def note(linear: nn.Linear, inputs: tuple[torch.Tensor], number: int, columns: slice) -> None:
        written = nn.functional.linear(inputs[0][:, tokens, columns], linear.weight[:, columns])
        seen.append(gates[number] * written.float())

    with contextlib.ExitStack() as hooks:
        for number, head in heads:
            block = transformer.single_transformer_blocks[number]
            size = block.attn.head_dim
            columns = slice(head * size, (head + 1) * size)
            hooks.callback(block.register_forward_pre_hook(partial(note_gate, number=number), with_kwargs=True).remove)
            hooks.callback(
                block.attn.to_out.register_forward_pre_hook(partial(note, number=number, columns=columns)).remove
            )
        yield seen
