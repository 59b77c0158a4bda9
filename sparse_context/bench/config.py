"""How to bench."""

from collections.abc import Sequence
from dataclasses import dataclass

from .methods import METHODS


@dataclass(frozen=True)
class BenchConfig:
    """What to measure: every method with every number of references, every keep that means something to it, every size.

    `references`: how many. `keep`: ratios in (0, 1). `size`: pixels a side of the output, and of the references where
    the model has no size of its own for these; none means the model's own. `methods`: names of `METHODS`, None for all
    that the model has; dense, which all are compared with, always comes along. `turns` after the warm-up; no further
    turn is begun that would end later than `minutes` after the start. `steps`: None means the model's own. Raises
    ValueError that names the value.
    """

    references: tuple[int, ...] = (1, 2, 4)
    keep: tuple[float, ...] = (0.2,)
    size: tuple[int, ...] = ()
    methods: tuple[str, ...] | None = None
    turns: int = 5
    minutes: float | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        for name, values in (("references", self.references), ("size", self.size)):
            for value in values:
                if value < 1:
                    raise ValueError(f"{name} is {value}: pass a number above 0.")
        for keep in self.keep:
            if not 0 < keep < 1:
                raise ValueError(f"keep is {keep}: pass a ratio above 0 and below 1.")
        for method in self.methods or ():
            if method not in METHODS:
                raise ValueError(f"method is {method!r}: choose among {', '.join(METHODS)}.")
        for name, number in (("turns", self.turns), ("steps", self.steps), ("minutes", self.minutes)):
            if number is not None and not number > 0:
                raise ValueError(f"{name} is {number}: pass a number above 0.")
        if self.methods is not None and "dense" not in self.methods:
            object.__setattr__(self, "methods", ("dense", *self.methods))

    def cells(self, methods: Sequence[str]) -> list[tuple[str, float | None]]:
        """(method, keep) of one setting, in the order in which they are run."""
        return [(m, keep) for m in methods for keep in (self.keep if METHODS[m].keeps else (None,))]
