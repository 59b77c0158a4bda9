"""Connecting to Ray, or starting it on this machine, quietly and with nothing sent to anybody."""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from ..layers import require

OBJECT_STORE = 200 * 2**20
"""Bytes of shared memory that Ray takes where it is started here: what is passed around is small."""


@contextmanager
def connected(cpus: int) -> Iterator[Any]:
    """The module `ray`, connected to the cluster that RAY_ADDRESS names, or to one that is started on this machine with
    so many logical CPUs and ends with the block. Within, what is printed goes to stderr: Ray reports dead workers with
    `print`, which would spoil what a command writes to stdout.

    Ray listens on all interfaces of a machine: it belongs in a closed network. Raises ImportError where it is not
    installed.
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
            ray.init(address, **quiet)
            try:
                yield ray
            finally:
                ray.shutdown()
