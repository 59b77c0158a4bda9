"""Memory that a step frees: kept for the next one by the command, and given back where the user says so."""

import os
import platform
import subprocess
import sys

import pytest

SCRIPT = """
import sys
from pathlib import Path

import torch

from sparse_context.training.memory import keep_freed_memory, return_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1])

if sys.argv[1] == "keep":
    keep_freed_memory()
if sys.argv[1] == "return":
    return_freed_memory()
before = resident()
block = torch.ones(2**24)
del block
if sys.argv[2] == "between":  # freed blocks that lie below one in use, once glibc has taken to keeping their size
    larger = torch.ones(2**22)
    del larger
    blocks = [torch.ones(2**18) for _ in range(64)]
    del blocks[:-1]
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.parametrize(
    ("what", "blocks", "variables", "kept"),
    [
        ("keep", "whole", {}, True),
        ("leave", "whole", {}, False),
        ("keep", "whole", {"MALLOC_TOP_PAD_": "131072"}, False),
        ("leave", "between", {}, True),
        ("return", "between", {}, False),
    ],
)
def test_what_is_freed_stays_with_the_process_where_it_is_asked_to(what, blocks, variables, kept):
    import torch

    if torch.accelerator.is_available():
        pytest.skip("memory is kept on machines without an accelerator")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | variables
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, what, blocks], env=environment, capture_output=True, text=True, check=True
    )
    pages = int(done.stdout)
    assert (pages * os.sysconf("SC_PAGE_SIZE") > 2**25) is kept
