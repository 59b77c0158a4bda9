"""Connecting to Ray, or starting it on this machine, quietly and with nothing sent to anybody."""

import math
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from ..layers import require
from ..pipelines.errors import GenerationError
from ..pipelines.hub import one_line

OBJECT_STORE = 200 * 2**20
"""Bytes of shared memory that Ray takes where it is started here: what is passed around is small."""


@contextmanager
def connected(cpus: int) -> Iterator[Any]:
    """The module `ray`, connected to the cluster that RAY_ADDRESS names, or to one that is started on this machine with
    so many logical CPUs and ends with the block. Within, what is printed goes to stderr: Ray reports dead workers with
    `print`, which would spoil what a command writes to stdout.

    Ray listens on all interfaces of a machine: it belongs in a closed network. Raises ImportError where it is not
    installed, and GenerationError for a cluster of another version of it or of Python.
    """
    require("ray")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # else `uv run` would have it install what is there
    import ray

    address = os.environ.get("RAY_ADDRESS", "local")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        if address == "local":  # whose sockets need a short path
            quiet |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE, "_temp_dir": folder}
            quiet["num_cpus"] = cpus
        with redirect_stdout(sys.stderr):
            try:
                ray.init(address, **quiet)
            except RuntimeError as error:
                ray.shutdown()
                raise GenerationError(f"Ray at {address} cannot be used: {one_line(error)}.") from error
            try:
                yield ray
            finally:
                ray.shutdown()


def check_gpus(gpus: float) -> None:
    """Raise ValueError for GPUs that no process can have: Ray shares one, or gives whole ones."""
    if not 0 <= gpus < math.inf or (gpus > 1 and gpus != int(gpus)):
        raise ValueError(f"gpus is {gpus:g}: pass a share of one, such as 0.5, or a whole number.")


def say_what_is_missing(ray: Any, processes: int, threads: int, gpus: float) -> None:
    """Print what Ray will wait for, as it says nothing itself. Raises ValueError where it runs on this machine alone,
    which gets no more of it."""
    there = ray.cluster_resources()
    shared = processes * gpus if gpus >= 1 or not gpus else math.ceil(processes / math.floor(1 / gpus))  # of whole ones
    asked = {"CPUs": ("CPU", processes * threads), "GPUs": ("GPU", shared)}
    missing = [
        f"too few {name} ({there.get(kind, 0):g} of {count:g})"
        for name, (kind, count) in asked.items()
        if count > there.get(kind, 0)
    ]
    if missing and os.environ.get("RAY_ADDRESS", "local") == "local":
        raise ValueError(f"Ray has {' and '.join(missing)}: ask for fewer, or name a cluster in RAY_ADDRESS.")
    if missing:
        print(f"Ray has {' and '.join(missing)}: what is left over waits until there are more.", file=sys.stderr)
