"""Schedules: (step, steps, warmup) -> the factor on the learning rate."""

import math
from collections.abc import Callable, Mapping


def learning_rate(step: int, steps: int, warmup: int) -> float:
    """The factor on the learning rate at `step`: up over `warmup` steps, flat, down to 0 over the last quarter."""
    return min(warming(step, warmup), (steps - step) / (steps / 4))


def constant(step: int, steps: int, warmup: int) -> float:
    """1 from the first step to the last."""
    return 1.0


def constant_with_warmup(step: int, steps: int, warmup: int) -> float:
    """Up over `warmup` steps, then flat."""
    return warming(step, warmup)


def linear(step: int, steps: int, warmup: int) -> float:
    """Up over `warmup` steps, then straight down to 0."""
    return min(warming(step, warmup), (steps - step) / max(steps - warmup, 1))


def cosine(step: int, steps: int, warmup: int) -> float:
    """Up over `warmup` steps, then down to 0 along half a cosine."""
    way = max(step - warmup, 0) / max(steps - warmup, 1)
    return min(warming(step, warmup), 0.5 * (1 + math.cos(math.pi * way)))


def warming(step: int, warmup: int) -> float:
    """The factor of a warm-up alone: up to 1 over `warmup` steps."""
    return min(1.0, (step + 1) / max(warmup, 1))


CLOCK = 10_000  # as many steps a run by the clock has, for its schedule


SCHEDULES: Mapping[str, Callable[[int, int, int], float]] = {
    "constant": constant,
    "constant_with_warmup": constant_with_warmup,
    "linear": linear,
    "cosine": cosine,
    "trapezoid": learning_rate,
}
