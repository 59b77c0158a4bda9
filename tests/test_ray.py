"""A server and a batch by Ray, of which a process is really killed: nothing is lost.

One cluster each, in a network of its own where that can be, for Ray listens on all interfaces.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install 'sparse-context[ray]'")
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group(name="ray")]

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def figures(tiny_model, tmp_path_factory):
    """What runs/ray_kills.py counts on a tiny model."""
    output = tmp_path_factory.mktemp("ray") / "ray_kills.json"
    command = [sys.executable, "runs/ray_kills.py", "--model", str(tiny_model), "--output", str(output)]
    command += ["--requests", "8", "--jobs", "6", "--steps", "60", "--clients", "4"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(output.read_text())["figures"]


def test_a_replica_that_is_killed_under_load_loses_no_request(figures):
    replica = figures["replica"]
    assert replica["statuses"] == {"200": 8} and replica["same_as_an_engine"] == 8
    assert replica["calls_made_again"] >= 1
    assert replica["exit_code"] == 130  # what an interrupt comes to


def test_an_actor_that_is_killed_costs_one_retry_and_makes_the_pictures_of_the_plain_batch(figures):
    actor = figures["actor"]
    assert actor["same_bytes"] == 6
    assert (actor["ray"]["made"], actor["ray"]["failed"], actor["ray"]["retries"]) == (6, 0, 1)
    assert actor["left_over"] == []
