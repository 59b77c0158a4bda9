"""Memory that was taken and that is left: of a CUDA device, or on a CPU of the machine."""

import contextlib
import ctypes
import os
from pathlib import Path

import torch

_RESET = Path("/proc/self/clear_refs")  # proc(5): a 5 sets the high-water mark back to what is resident now


_MEMINFO = Path("/proc/meminfo")


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error is of memory that ran out: an accelerator's, or the machine's, for which torch has no error of
    its own."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process could still take on a device; None where nobody knows."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu" or not _MEMINFO.is_file():
        return None
    lines = _MEMINFO.read_text(encoding="ascii").splitlines()
    return 1024 * next((int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), 0) or None


class Peak:
    """Peak memory since `reset`, in bytes above what was held when this was made; so weights are not counted.

    On CUDA, what tensors took (the allocator's own figure). On a CPU under Linux, the peak of the process's resident
    set, before which glibc is told to give back what was freed; where there is another C library, a phase may seem to
    need less than it does, for it takes what an earlier one has left. Elsewhere `read` gives None.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._before = 0
        self.reset()
        self._before = self.read() or 0

    def reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif os.access(_RESET, os.W_OK):
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(None).malloc_trim(0)
            _RESET.write_text("5", encoding="ascii")

    def read(self) -> int | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self._before
        if self.device.type != "cpu" or not os.access(_RESET, os.W_OK):
            return None
        lines = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace").splitlines()
        kilobytes = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
        return max(0, 1024 * kilobytes - self._before)
