"""What a benchmark measured, as records: written with `asdict`, and read with `Figures(**figures)`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from ..families.shape import Tokens


@dataclass(frozen=True)
class Spread:
    """A figure over the turns."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """That of one value a turn."""
        return cls(round(median(values), 5), round(min(values), 5), round(max(values), 5))


@dataclass(frozen=True)
class Setting:
    """What was called: the size of the output in pixels a side, how many references, by which method and keep."""

    size: int
    references: int
    method: str
    keep: float | None


@dataclass(frozen=True)
class Measurement:
    """One setting as it was timed: the seconds of each phase, one a turn.

    tokens: what the transformer got. memory: peak bytes by phase; None where it was not watched. extrapolated: the
    seconds of denoising with all blocks, where a few were timed.
    """

    setting: Setting
    tokens: Tokens
    seconds: Mapping[str, Sequence[float]]
    memory: Mapping[str, int] | None = None
    extrapolated: float | None = None


@dataclass(frozen=True)
class Row:
    """One setting, compared with dense.

    size to keep: as in `Setting`. tokens, memory, extrapolated: as in `Measurement`. seconds: by phase. speedup: of
    "total" and "denoise", how many times faster than dense, turn by turn. flops_speedup: what the FLOPs of denoising
    allow. share_of_flops: how much of that was reached. share_of_ceiling: how much of the speed-up of no references at
    all; None where that was not timed.
    """

    size: int
    references: int
    method: str
    keep: float | None
    tokens: Tokens
    seconds: Mapping[str, Spread]
    speedup: Mapping[str, Spread]
    flops_speedup: float
    share_of_flops: float
    share_of_ceiling: float | None = None
    memory: Mapping[str, int] | None = None
    extrapolated: float | None = None

    def __post_init__(self) -> None:
        """Take what JSON has of them for the records."""
        if isinstance(self.tokens, Mapping):
            object.__setattr__(self, "tokens", Tokens(**self.tokens))
        for name in ("seconds", "speedup"):
            spreads = {
                phase: Spread(**each) if isinstance(each, Mapping) else each
                for phase, each in getattr(self, name).items()
            }
            object.__setattr__(self, name, spreads)


@dataclass
class Figures:
    """A benchmark.

    turns: after the warm-up. steps: of a call. blocks, of: double and single blocks that were timed, and those that the
    model has; None for whole calls. took: seconds of it all. reached: what a run asked of it, by name.
    """

    turns: int
    steps: int
    rows: list[Row]
    blocks: tuple[int, int] | None = None
    of: tuple[int, int] | None = None
    took: float | None = None
    reached: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Take what JSON has of the rows for the records."""
        self.rows = [Row(**row) if isinstance(row, Mapping) else row for row in self.rows]
        for name in ("blocks", "of"):
            if getattr(self, name) is not None:
                setattr(self, name, tuple(getattr(self, name)))
