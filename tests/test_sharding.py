"""Runs on weights that two processes share against one process, by real processes over gloo (sharded.py)."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sharded
import torch
from diffusers import Flux2Transformer2DModel
from PIL import Image
from safetensors.torch import load_file

import sparse_context
from sparse_context.training.checkpoint_files import TENSORS
from sparse_context.training.checkpoints import newest_step
from sparse_context.training.export import LORA_FILE
from sparse_context.training.run_folder import check_same

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group(name="processes"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]


def environment():
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(sparse_context.__file__).parents[1])])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of all runs, and with what code each process ended."""
    root = tmp_path_factory.mktemp("sharded")
    command = [sys.executable, sharded.__file__, str(root)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return root, json.loads(done.stdout.splitlines()[-1])


def records(run, name):
    return np.array([[r[name] for r in map(json.loads, (run / "log.jsonl").read_text().splitlines())]])


def same(one, other, atol=5e-4):
    """Whether two files hold the same tensors, of one name, type and shape each.

    Muon makes the last bits of a gradient larger: on some processors by 1.5e-4 in two steps, of 1e-3 each.
    """
    one, other = load_file(one), load_file(other)
    return (
        one.keys() == other.keys()
        and all(one[name].dtype == other[name].dtype and one[name].shape == other[name].shape for name in one)
        and all(torch.allclose(one[name].float(), other[name].float(), rtol=0, atol=atol) for name in one)
    )


@pytest.mark.parametrize(("one", "other"), [("lora-1", "lora-2"), ("full-1", "full-2")])
def test_two_processes_with_half_of_the_weights_each_train_as_one_with_all(one, other, runs):
    """A LoRA with subsets, EMA and a teacher for some batches; all weights with Muon and AdamW. Validation lies between
    steps, with the averaged weights."""
    root, codes = runs
    assert codes[other] == [0, 0]
    one, other = root / one, root / other
    assert json.loads((other / "config.json").read_text())["processes"] == 2
    assert np.ptp(records(one, "loss")) > 0.1  # so that nothing is the same because nothing happens
    for name in ("loss", "norm"):
        assert np.abs(records(one, name) - records(other, name)).max() < 1e-5
    for step in (sharded.MIDDLE, sharded.STEPS):
        folder = f"step-{step:07d}"
        assert all(same(one / folder / name, other / folder / name) for name in TENSORS)
        pictures = [np.asarray(Image.open(run / "validation" / f"{folder}.webp")).astype(int) for run in (one, other)]
        assert np.abs(pictures[0] - pictures[1]).max() <= 1


@pytest.mark.parametrize(("source", "target", "count"), [("lora-1", "lora-1to2", 2), ("full-2", "full-2to1", 1)])
def test_a_checkpoint_goes_on_with_another_number_of_processes(source, target, count, runs):
    root, codes = runs
    assert codes.get(target, [0]) == [0] * count
    assert json.loads((root / target / "config.json").read_text())["processes"] == count
    assert np.abs(records(root / source, "loss") - records(root / target, "loss")).max() < 1e-5
    folder = f"step-{sharded.STEPS:07d}"
    assert all(same(root / source / folder / name, root / target / folder / name) for name in TENSORS)


def test_what_sharded_runs_leave_is_what_one_process_leaves(runs):
    root, _ = runs
    assert same(root / "lora-1" / LORA_FILE, root / "lora-2" / LORA_FILE)
    one, other = (Flux2Transformer2DModel.from_pretrained(root / run / "transformer") for run in ("full-1", "full-2"))
    assert type(other) is Flux2Transformer2DModel and dict(one.config) == dict(other.config) | {
        "_name_or_path": one.config["_name_or_path"]
    }
    weights = other.state_dict()
    assert all(torch.allclose(value, weights[name], rtol=0, atol=5e-4) for name, value in one.state_dict().items())
    for kind in ("lora", "full"):
        cards = [(root / f"{kind}-{n}" / "README.md").read_text() for n in (1, 2)]
        assert cards[0].replace("2 batches a step |", "one batch a step on each of 2 processes |") == cards[1]


def test_a_process_that_is_killed_ends_the_run_in_one_sentence(runs):
    root, codes = runs
    assert codes["killed"] == [2, -9]
    said = re.split(r"[\r\n]+", (root / "killed.0.txt").read_text().strip())
    assert [line for line in said if "step/s" not in line] == [
        f"{root / 'killed'} holds no checkpoint, so the run starts anew.",
        "sparse-context: Process 1 of 2 (counted from 0) died, and the run with it: start it again with --resume "
        "latest, and it goes on from its last checkpoint.",
    ]


def test_under_torchrun_a_killed_run_starts_again_by_itself_and_ends_where_an_unbroken_one_does(runs):
    root, codes = runs
    assert codes["whole"] == [0, 0] and codes["torchrun"] == [0]
    assert len((root / "killed.pids").read_text().splitlines()) == 6  # two each: by hand, by torchrun, and again by it
    assert newest_step(root / "killed") == 12
    names = [LORA_FILE, *(f"step-0000012/{name}" for name in TENSORS)]
    assert all((root / "killed" / name).read_bytes() == (root / "whole" / name).read_bytes() for name in names)
    assert np.array_equal(records(root / "killed", "loss"), records(root / "whole", "loss"))


def test_another_number_of_processes_is_told_how_many_batches_it_takes(runs):
    folder = runs[0] / "lora-2"
    record = json.loads((folder / "config.json").read_text()) | {"processes": 1}
    with pytest.raises(ValueError, match=r"takes 2 batches a step, on 2 processes .* gradient_accumulation_steps=2\.$"):
        check_same(folder, record, True)
    check_same(folder, record | {"gradient_accumulation_steps": 2, "fsdp": False}, True)
