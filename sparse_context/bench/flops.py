"""How many floating-point operations a call takes in a transformer: what a speed-up can be at most.

What one forward takes is counted by each family for its kinds of transformer (`families.*.bench`). The test holds the
whole count to torch's own.
"""

from typing import NamedTuple

from ..families.shape import Shape, Tokens


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

    mode: as in `Pass`; None for kinds that do not reuse keys and values.
    """
    return shape.kind.flops(shape, tokens, mode)


def call_flops(shape: Shape, tokens: Tokens, steps: int, kv: bool = False) -> int:
    """FLOPs of the transformer in a call of `steps` steps."""
    return sum(each.times * forward_flops(shape, tokens, each.mode) for each in passes(steps, tokens, kv))
