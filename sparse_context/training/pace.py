"""How far a run is, by its steps or by the clock, and the learning rate that follows from it."""

import contextlib
import time
from collections.abc import Iterator, Sequence

import torch

from .processes import Processes
from .schedules import CLOCK, SCHEDULES, warming


class Pace:
    """The place of a step in its run. The clock starts when this is made.

    With `seconds` the run goes by the clock: it is over then, or after `stop_after` seconds if that comes first, and
    the schedule's last step comes at that time.
    """

    def __init__(
        self,
        steps: int,
        warmup: int,
        schedule: str,
        stop_after: float | None,
        seconds: float | None,
        processes: Processes,
    ) -> None:
        self._steps, self._warmup, self._schedule = steps, warmup, schedule
        self._seconds, self._processes = seconds, processes
        self._limit = min((limit for limit in (stop_after, seconds) if limit is not None), default=None)
        self.ends_by_the_clock = seconds is not None and self._limit == seconds
        self._started = time.monotonic()

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    def share(self, step: int) -> float:
        """How much of the run is behind it before `step`, in [0, 1]."""
        if self._seconds is None:
            return step / self._steps
        # One clock for all processes, or their weights would part
        return min(self._processes.mean_of(self.elapsed() / self._seconds), 1.0)

    def factor(self, step: int) -> float:
        """The factor on the learning rate at `step`."""
        schedule = SCHEDULES[self._schedule]
        if self._seconds is None:  # exact in whole steps, where a share would round
            return schedule(step, self._steps, self._warmup)
        warm = 1.0 if self._schedule == "constant" else warming(step, self._warmup)
        return schedule(round(self.share(step) * CLOCK), CLOCK, 0) * warm

    def is_over(self) -> bool:
        """Whether the time is up in any process: all stop where the first one does."""
        return self._limit is not None and self._processes.any(self.elapsed() > self._limit)


@contextlib.contextmanager
def scaled(optimisers: Sequence[torch.optim.Optimizer], factor: float) -> Iterator[list[float]]:
    """The learning rates times `factor` inside, and as they were afterwards; gives the latter."""
    groups = [group for optimiser in optimisers for group in optimiser.param_groups]
    rates = [group["lr"] for group in groups]
    try:
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate * factor
        yield rates
    finally:
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
