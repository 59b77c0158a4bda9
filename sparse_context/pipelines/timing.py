"""The time of one pipeline call, split into its phases.

A phase is charged for its own work, also where that is queued: on CUDA the device itself notes when it gets to the
phase and when it is done, and is asked at the end of the call. So nothing waits between phases that does not without a
clock.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..sparsify import last_selection
from .memory import Peak


@dataclass
class Times:
    """Seconds of one call. `total` is more than the sum: it has preprocessing, the scheduler and the rest too.

    text: prompt encoding. encode: the VAE on the references. selection: scoring and choosing tokens, which on an
    accelerator runs beside encoding and may cost the call less than that, or nothing. denoise: from the first forward
    of the transformer to the start of decoding. decode: the VAE on the output.
    """

    text: float = 0.0
    encode: float = 0.0
    selection: float = 0.0
    denoise: float = 0.0
    decode: float = 0.0
    total: float = 0.0

    def __str__(self) -> str:
        parts = ("text", "encode", "selection", "denoise", "decode")
        return f"{self.total:.2f} s (" + ", ".join(f"{p} {1000 * getattr(self, p):.0f} ms" for p in parts) + ")"


def now(device: torch.device) -> float:
    """The clock, in seconds, once `device` has finished what it was given."""
    if device.type in ("cuda", "mps", "xpu"):
        getattr(torch, device.type).synchronize()
    return time.perf_counter()


class _Moment:
    """A moment in the work of a device: when it has done all that it was given so far."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(device))
        else:
            self._clock = now(device)

    def until(self, end: "_Moment") -> float:
        """Seconds, once the device has come to `end`."""
        if self._event is not None and end._event is not None:
            return self._event.elapsed_time(end._event) / 1000
        return end._clock - self._clock


Watcher = Callable[..., AbstractContextManager]


class _Watched:
    """A method in whose calls others look on: they come and go in any order, as calls of several threads do."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self.method = method
        self.watchers: list[Watcher] = []
        self.put_back: Callable[[], None] = lambda: None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for watcher in tuple(self.watchers):
                stack.enter_context(watcher(*args, **kwargs))
            return self.method(*args, **kwargs)


_changing = threading.Lock()


@contextmanager
def watching(owner: Any, name: str, watcher: Watcher) -> Iterator[None]:
    """Enter `watcher(...)`, with what the call is given, around the calls of a method of this instance; the last who
    leaves puts it back as it was."""
    with _changing:
        was_set, previous = name in vars(owner), vars(owner).get(name)
        watched = previous if isinstance(previous, _Watched) else _Watched(getattr(owner, name))
        if watched is not previous:
            watched.put_back = lambda: setattr(owner, name, previous) if was_set else delattr(owner, name)
            setattr(owner, name, watched)
        watched.watchers.append(watcher)
    try:
        yield
    finally:
        with _changing:
            watched.watchers.remove(watcher)
            if not watched.watchers:
                watched.put_back()


@contextmanager
def timed(pipe: Any, peaks: dict[str, int] | None = None) -> Iterator[Times]:
    """Time the one call of `pipe` that is made inside; the figures are there when the block ends.

    Watches `encode_prompt` (of a modular pipeline, which has none, its text encoder), `vae.encode`, `vae.decode` and
    the transformer of these instances, and lets go after. `peaks` is filled with the peak memory of each of these
    phases in bytes (`memory.Peak`), where it can be told; looking costs time, so it is for calls whose times do not
    count.
    """
    times, device = Times(), pipe._execution_device
    phases: list[tuple[str, _Moment, _Moment]] = []
    denoising: list[_Moment] = []  # its start, while it lasts
    peak = None if peaks is None else Peak(device)

    def start_phase() -> _Moment:
        if peak is not None:
            peak.reset()
        return _Moment(device)

    def end_phase(phase: str, start: _Moment) -> None:
        phases.append((phase, start, _Moment(device)))
        if peaks is not None and peak is not None and (bytes := peak.read()) is not None:
            peaks[phase] = max(bytes, peaks.get(phase, 0))

    def charge(owner: Any, name: str, phase: str, stack: ExitStack) -> None:
        @contextmanager
        def charged(*_: Any, **__: Any) -> Iterator[None]:
            if phase == "decode" and denoising:
                end_phase("denoise", denoising.pop())
            start = start_phase()
            try:
                yield
            finally:
                end_phase(phase, start)

        stack.enter_context(watching(owner, name, charged))

    def start_denoising(*_: Any) -> None:
        if not denoising and "denoise" not in [phase for phase, *_ in phases]:
            denoising.append(start_phase())

    with ExitStack() as stack:
        if hasattr(pipe, "encode_prompt"):
            charge(pipe, "encode_prompt", "text", stack)
        elif getattr(pipe, "text_encoder", None) is not None:
            charge(pipe.text_encoder, "forward", "text", stack)
        charge(pipe.vae, "encode", "encode", stack)
        charge(pipe.vae, "decode", "decode", stack)
        stack.callback(pipe.transformer.register_forward_pre_hook(start_denoising).remove)
        start = now(device)
        yield times
        times.total = now(device) - start
    if denoising:
        end_phase("denoise", denoising.pop())
        now(device)
    for phase, begun, ended in phases:
        setattr(times, phase, getattr(times, phase) + begun.until(ended))
    selection = last_selection(pipe)
    times.selection = selection.seconds if selection else 0.0
