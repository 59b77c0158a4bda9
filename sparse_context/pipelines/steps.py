"""One call at a time, looked at between its denoise steps: who waits, who leaves, how far it is, what it looks like."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from PIL import Image

from .timing import watching

PATIENCE = 0.05
"""Seconds between two looks at whether a request that waits for its turn was cancelled."""

Cancel = threading.Event | Callable[[], bool]
"""Asked before each denoise step: an event that is set, or a function that returns True, cancels the call."""

Progress = Callable[[int, int], Any]
"""Called after each denoise step with (step, steps), the first being 1. It must not call its engine, which is busy."""

Decode = Callable[[torch.Tensor], list[Image.Image]]
"""From latents, as a pipeline's scheduler has them, to one picture for each prompt."""

Draw = Callable[[], list[Image.Image]]

Preview = Callable[[int, int, Draw], Any]
"""Called after each denoise step with (step, steps, draw). `draw()` decodes what the model by then expects in the end,
a picture for each prompt. That costs a decoding."""


class Stop(BaseException):
    """Leaves a call from inside of it. No Exception, for modular pipelines log those with their whole traceback."""


_locks: WeakKeyDictionary[Any, threading.Lock] = WeakKeyDictionary()
_adding_lock = threading.Lock()


@contextlib.contextmanager
def turn(pipe: Any, cancel: Cancel | None) -> Iterator[None]:
    """Wait until no other call of this pipeline is under way. Leaves by `Stop` where `cancel` says so meanwhile."""
    with _adding_lock:
        lock = _locks.setdefault(pipe, threading.Lock())
    while not lock.acquire(timeout=-1 if cancel is None else PATIENCE):
        if cancel is not None and _is_cancelled(cancel):
            raise Stop
    try:
        yield
    finally:
        lock.release()


def _is_cancelled(cancel: Cancel) -> bool:
    return cancel.is_set() if isinstance(cancel, threading.Event) else bool(cancel())


@contextlib.contextmanager
def stepwise(
    pipe: Any,
    cancel: Cancel | None,
    progress: Progress | None,
    preview: Preview | None = None,
    decode: Decode | None = None,
) -> Iterator[None]:
    """Ask `cancel` before each denoise step of the call inside, and tell `progress` and `preview` after it.

    decode: from latents as the scheduler has them to pictures; None: `preview` is never called.
    """
    preview = None if decode is None else preview
    if cancel is None and progress is None and preview is None:
        yield
        return
    if cancel is not None and _is_cancelled(cancel):
        raise Stop
    step, scheduler = 0, pipe.scheduler

    @contextlib.contextmanager
    def watched(*inputs: Any, **_: Any) -> Iterator[None]:
        nonlocal step
        if cancel is not None and _is_cancelled(cancel):
            raise Stop
        yield
        step += 1
        if progress is None and preview is None:
            return
        # Inpainting may begin in the middle of the schedule
        steps = len(scheduler.timesteps) - (getattr(scheduler, "begin_index", None) or 0)
        if progress is not None:
            progress(step, steps)
        if preview is not None and decode is not None:
            preview(step, steps, partial(_draw, scheduler, decode, *inputs[:3]))

    with watching(scheduler, "step", watched):
        yield


def _draw(
    scheduler: Any, decode: Decode, velocity: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor
) -> list[Image.Image]:
    """What a step of flow matching expects in the end: its sample is `expected + sigma * velocity`."""
    sigma = timestep / scheduler.config.num_train_timesteps
    return decode((sample - sigma * velocity).to(sample.dtype))
