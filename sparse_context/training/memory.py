"""Memory that one training step frees and the next one takes again."""

import ctypes
import os
import platform

import torch

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Have the C library keep what this process frees, for its next use.

    glibc gives large blocks back to the system at once, and the next step waits until their pages are mapped and
    cleared anew, which can take a tenth of it on a CPU. Afterwards the process holds its peak until it ends, so this is
    for a command of its own and not for a library. It does nothing where there is an accelerator, with another C
    library than glibc, and where an environment variable (MALLOC_...) already says how malloc is to work.
    """
    if torch.accelerator.is_available() or platform.libc_ver()[0] != "glibc":
        return
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(MMAP_MAX, 0)  # blocks of their own, which are returned whole
    libc.mallopt(TRIM_THRESHOLD, 2**31 - 1)  # bytes at the end of the heap that may stay unused
