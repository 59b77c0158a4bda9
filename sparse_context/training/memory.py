"""What becomes of memory that a training step frees: kept for the next one, or given back so that it is measured."""

import ctypes
import os
import platform

import torch

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Have the C library keep what this process frees, for its next use.

    glibc gives large blocks back to the system at once, and the next step waits until their pages are mapped and
    cleared anew, which can take a tenth of it on a CPU. Afterwards the process holds its peak until it ends, so this is
    for a command of its own and not for a library. It does nothing where there is an accelerator, with another C
    library than glibc, and where an environment variable (MALLOC_...) already says how malloc is to work.
    """
    if _decides():
        libc = ctypes.CDLL(None)
        libc.mallopt(MMAP_MAX, 0)  # blocks of their own, which are returned whole
        libc.mallopt(TRIM_THRESHOLD, 2**31 - 1)  # bytes at the end of the heap that may stay unused


def return_freed_memory() -> None:
    """Have the C library give back at once what this process frees, so that its resident set is what tensors take.

    By itself, glibc keeps freed blocks of up to 32 MiB in its heap, between others that are in use: a step on a CPU
    then seems to take up to 1.6 times as much. Steps become slower by what `keep_freed_memory` says. It does nothing
    where that one does nothing.
    """
    if _decides():
        libc = ctypes.CDLL(None)
        libc.mallopt(MMAP_THRESHOLD, 2**16)  # bytes from which a block is one of its own, from now on for good
        libc.mallopt(TRIM_THRESHOLD, 2**16)


def _decides() -> bool:
    """Whether the C library is one that this file knows, and nobody else said how it is to work."""
    if torch.accelerator.is_available() or platform.libc_ver()[0] != "glibc":
        return False
    return not any(name.startswith("MALLOC_") for name in os.environ)
