"""How many floating-point operations a call takes in a FLUX.2 transformer: what a speed-up can be at most.

Every block costs 26 d^2 a token in its linear layers (q, k, v, out, and a gated MLP of width 3d) and 4d for each pair
of a query and a key, d being the width. The test holds the whole count, not only this, to torch's own.
"""

from dataclasses import dataclass
from typing import NamedTuple

from .shapes import Shape


@dataclass(frozen=True)
class Tokens:
    """Of one call: text, output, and the references that the transformer gets (0 without any)."""

    text: int
    output: int
    references: int

    @property
    def total(self) -> int:
        return self.text + self.output + self.references


class Pass(NamedTuple):
    """One kind of forward in a call, and how often it is run. `mode` is the transformer's `kv_cache_mode`."""

    mode: str | None
    times: int


def passes(steps: int, tokens: Tokens, kv: bool) -> list[Pass]:
    """The forwards of a call: with KV reuse the references go in at the first step only."""
    if not kv or not tokens.references:
        return [Pass(None, steps)]
    return [Pass("extract", 1), Pass("cached", steps - 1)] if steps > 1 else [Pass("extract", 1)]


def forward_flops(shape: Shape, tokens: Tokens, mode: str | None = None) -> int:
    """FLOPs of one forward with batch 1, a multiply and an add being two; norms and activations are not counted.

    mode: None, everything attends to everything. "extract", references attend to themselves alone, the rest to all.
    "cached", text and output attend to all, and the references' keys and values are there already.
    """
    width, rest = shape.width, tokens.text + tokens.output
    seen = rest if mode == "cached" else tokens.total
    pairs = rest * tokens.total
    if mode is None:
        pairs = tokens.total**2
    elif mode == "extract":
        pairs += tokens.references**2
    blocks = (shape.double_blocks + shape.single_blocks) * (26 * width**2 * seen + 4 * width * pairs)
    embedded = 2 * width * (shape.channels * (seen - tokens.text) + shape.text_width * tokens.text)
    # FLUX.2 projects the references' tokens out as well, unless it knows which they are
    leaving = 2 * width * shape.channels * (tokens.output if mode else seen - tokens.text)
    timesteps = 2 if mode == "extract" else 1  # references have a modulation of their own at t = 0
    embedding = 2 * width * (256 + width) * (2 if shape.guidance else 1)
    modulation = 2 * width**2 * (6 * 2 + 3)
    if mode == "extract":  # but not for the text
        modulation += 2 * width**2 * (6 + 3)
    return blocks + embedded + leaving + timesteps * embedding + modulation + 2 * 2 * width**2


def call_flops(shape: Shape, tokens: Tokens, steps: int, kv: bool = False) -> int:
    """FLOPs of the transformer in a call of `steps` steps."""
    return sum(each.times * forward_flops(shape, tokens, each.mode) for each in passes(steps, tokens, kv))
