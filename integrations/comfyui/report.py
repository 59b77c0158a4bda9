"""What a run of the sampler did, in words."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from sparse_context import Selection

LAYERS = 24  # times width squared: what a token costs in the linear layers of a block; a pair of tokens costs 4 widths


class Forward(NamedTuple):
    """One kind of forward. width: of the model. text, output, whole, kept: tokens; `whole` is of all references before
    any was dropped. reuses: whether the references' keys and values are there from an earlier step."""

    width: int
    text: int
    output: int
    whole: int
    kept: int
    reuses: bool

    def cost(self, references: int) -> int:
        """What it takes with so many reference tokens, in some unit: the count of `sparse_context.bench.flops` for one
        block, less what all lengths have in common."""
        rest = self.text + self.output
        moved = rest if self.reuses else rest + references
        return moved * (LAYERS * self.width + 4 * (rest + references))


class Run:
    """What one run of the sampler did. `forwards` counts them by kind. `problems` are sentences for the user."""

    def __init__(self) -> None:
        self.forwards: Counter[Forward] = Counter()
        self.selections: list[Selection] = []
        self.problems: list[str] = []

    def add(self, forward: Forward, selection: Selection) -> None:
        self.forwards[forward] += 1
        if not any(each is selection for each in self.selections):
            self.selections.append(selection)

    @property
    def speedup(self) -> float:
        """How many times faster the model's forwards are than with all tokens, by arithmetic alone."""
        whole = sum(times * forward.cost(forward.whole) for forward, times in self.forwards.items())
        kept = sum(times * forward.cost(forward.kept) for forward, times in self.forwards.items())
        return whole / kept

    def __str__(self) -> str:
        lines = [str(selection) for selection in self.selections]
        if any(forward.kept < forward.whole for forward in self.forwards):
            lines.append(
                f"The model's steps should be about {self.speedup:.1f} times faster than with all reference tokens. "
                "This is calculated, not measured, and leaves out the text encoder and the VAE."
            )
        return "\n".join([*lines, *self.problems])
