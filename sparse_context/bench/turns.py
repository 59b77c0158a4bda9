"""Methods taken turn by turn, and what a transformer sees meanwhile."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm

from ..families.shape import Tokens
from .config import BenchConfig


def take_turns(jobs: Sequence[Callable[[bool], Any]], config: BenchConfig) -> list[list[Any]]:
    """What each job gives in each turn after the warm-up. A job is told whether it is the warm-up."""
    start = time.perf_counter()
    results: list[list[Any]] = [[] for _ in jobs]
    with tqdm(total=len(jobs) * (1 + config.turns), desc="bench", unit="run") as bar:
        for turn in range(config.turns + 1):
            begun = time.perf_counter()
            for job, result in zip(jobs, results, strict=True):
                measured = job(turn == 0)
                if turn:
                    result.append(measured)
                bar.update()
            end = time.perf_counter()
            if turn and config.minutes is not None and 2 * end - begun - start > 60 * config.minutes:
                break
    return results


def watch_tokens(transformer: Any, seen: list[Tokens], side: int) -> Any:
    """A hook that adds to `seen` what each forward gets, beside `side` x `side` tokens of the output."""

    def record(module: Any, args: tuple, kwargs: dict) -> None:
        got = kwargs["hidden_states"].shape[1] - side * side
        seen.append(Tokens(kwargs["encoder_hidden_states"].shape[1], side * side, got))

    return transformer.register_forward_pre_hook(record, with_kwargs=True)
