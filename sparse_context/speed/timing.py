"""The time of one pipeline call, split into its phases.

The clock is read only after the device has finished what it was given, so a phase is charged for its own work.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..sparsify import last_selection


@dataclass
class Times:
    """Seconds of one call. `total` is more than the sum: it has preprocessing, the scheduler and the rest too.

    text: prompt encoding. encode: the VAE on the references. selection: scoring and choosing tokens. denoise: from the
    first forward of the transformer to the start of decoding. decode: the VAE on the output.
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


@contextmanager
def timed(pipe: Any) -> Iterator[Times]:
    """Time the one call of `pipe` that is made inside; the figures are there when the block ends.

    Watches `encode_prompt` (of a modular pipeline, which has none, its text encoder), `vae.encode`, `vae.decode` and
    the transformer of these instances, and lets go after.
    """
    times, device = Times(), pipe._execution_device
    denoise_started: list[float] = []

    def now() -> float:
        if device.type in ("cuda", "mps", "xpu"):
            getattr(torch, device.type).synchronize()
        return time.perf_counter()

    def charge(owner: Any, name: str, phase: str, stack: ExitStack) -> None:
        method = getattr(owner, name)
        had_own, before = name in vars(owner), vars(owner).get(name)

        def watched(*args, **kwargs):
            start = now()
            if phase == "decode" and denoise_started and not times.denoise:
                times.denoise = start - denoise_started[0]
            try:
                return method(*args, **kwargs)
            finally:
                setattr(times, phase, getattr(times, phase) + now() - start)

        setattr(owner, name, watched)
        stack.callback(lambda: setattr(owner, name, before) if had_own else delattr(owner, name))

    def start_denoising(*_: Any) -> None:
        if not denoise_started:
            denoise_started.append(now())

    with ExitStack() as stack:
        if hasattr(pipe, "encode_prompt"):
            charge(pipe, "encode_prompt", "text", stack)
        else:
            charge(pipe.text_encoder, "forward", "text", stack)
        charge(pipe.vae, "encode", "encode", stack)
        charge(pipe.vae, "decode", "decode", stack)
        stack.callback(pipe.transformer.register_forward_pre_hook(start_denoising).remove)
        start = now()
        yield times
        end = now()
    times.total = end - start
    if denoise_started and not times.denoise:
        times.denoise = end - denoise_started[0]
    selection = last_selection(pipe)
    times.selection = selection.seconds if selection else 0.0
