"""How several processes are started, by the examples, and what is refused before they train."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import accelerate
import pytest
from accelerate.commands import launch as accelerate_launch
from accelerate.utils import FullyShardedDataParallelPlugin
from diffusers import Flux2KleinPipeline
from safetensors.torch import load_file
from tiny import build_flux2, build_longcat, picture
from torch.distributed.run import get_args_parser

import sparse_context
from sparse_context.training.config import TrainConfig
from sparse_context.training.export import LORA_FILE
from sparse_context.training.launch import check_base, start_accelerator
from sparse_context.training.options import RunConfig, read_settings
from sparse_context.training.sharding import block_classes, is_asked_for

ROOT = Path(sparse_context.__file__).parents[1]
LAUNCHERS = ROOT / "examples" / "launchers"


# What does not go together --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["use_8bit_adam", "compile"])
def test_what_needs_whole_weights_is_refused(other):
    with pytest.raises(ValueError, match=f"^fsdp is True and so is {other}, .*: leave one of the two out.$"):
        TrainConfig(fsdp=True, **{other: True})


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_quantised_weights_are_not_sharded(quantization):
    with pytest.raises(
        ValueError, match=f"^fsdp is True and quantization is '{quantization}', .* leave one of the two"
    ):
        check_base(TrainConfig(fsdp=True), RunConfig(quantization=quantization))


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"fsdp_version": 1}, "fsdp_version is 1"),
        ({"activation_checkpointing": True}, "fsdp_activation_checkpointing is true"),
        ({"cpu_offload": True}, "fsdp_offload_params is true"),
        ({"reshard_after_forward": False}, "fsdp_reshard_after_forward is false"),
    ],
)
def test_what_of_accelerate_s_config_is_not_done_is_refused(setting, said, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))  # which it writes to
    plugin = FullyShardedDataParallelPlugin(**{"fsdp_version": 2, **setting})
    with pytest.raises(ValueError, match=f"^{said} in accelerate's config, "):
        is_asked_for(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)))


def test_processes_of_which_accelerate_does_not_know_are_refused(tmp_path, monkeypatch):
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.Accelerator(cpu=True)  # whose state is taken for that of the next one
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="^2 processes were started, and accelerate knows of 1: "):
        start_accelerator(RunConfig(), tmp_path)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_blocks_are_found_by_class_where_no_class_is_named_too():
    klein = build_flux2(Flux2KleinPipeline, is_distilled=True).transformer
    assert {kind.__name__ for kind in block_classes(klein)} == {
        "Flux2TransformerBlock",
        "Flux2SingleTransformerBlock",
    }
    assert {kind.__name__ for kind in block_classes(build_longcat().transformer)} == {
        "LongCatImageTransformerBlock",
        "LongCatImageSingleTransformerBlock",
    }


# Launchers ------------------------------------------------------------------------------------------------------------


def test_the_config_for_accelerate_asks_for_what_is_done_here(monkeypatch):
    """Read by accelerate's own command, down to what its processes find in their environments."""
    parser = accelerate_launch.launch_command_parser()
    given = parser.parse_args(["--config_file", str(LAUNCHERS / "fsdp.yaml"), "-m", "sparse_context.training"])
    given, *_ = accelerate_launch._validate_launch_command(given)
    assert given.use_fsdp and given.num_processes == 4 and given.mixed_precision == "bf16"
    monkeypatch.setattr(os, "environ", accelerate_launch.prepare_multi_gpu_env(given) | {"WORLD_SIZE": "4"})
    assert is_asked_for(SimpleNamespace(state=SimpleNamespace()))
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
def test_the_slurm_script_starts_torchrun_on_each_machine(tmp_path):
    """With an srun that prints its arguments, read by torchrun's own parser and by ours."""
    for name, does in (("srun", 'printf "%s\\n" "$@"'), ("scontrol", "printf 'one\\ntwo\\n'")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"JOB_NODELIST": "one,two", "JOB_NUM_NODES": "2", "GPUS_ON_NODE": "4", "JOB_ID": "7"}
    done = subprocess.run(
        ["bash", str(LAUNCHERS / "slurm.sbatch"), "--data", "train.jsonl"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", **{f"SLURM_{name}": value for name, value in slurm.items()}},
        capture_output=True,
        text=True,
        check=True,
    )
    srun, torchrun, *arguments = done.stdout.splitlines()
    assert (srun, torchrun) == ("--kill-on-bad-exit=1", "torchrun")
    read = get_args_parser().parse_args(arguments)
    assert (read.nnodes, read.nproc_per_node, read.max_restarts, read.rdzv_endpoint) == ("2", "4", 3, "one:29500")
    assert read.module and read.training_script == "sparse_context.training"
    options = read.training_script_args
    sets = [value for flag, value in zip(options, options[1:], strict=False) if flag == "--set"]
    assert read_settings(sets=sets).config.fsdp
    assert options[-4:] == ["--resume", "latest", "--data", "train.jsonl"]


@pytest.mark.slow
@pytest.mark.xdist_group(name="ray")
def test_ray_train_runs_two_processes_on_this_machine(tiny_model, tmp_path):
    """In a network of its own where that can be, for Ray listens on all interfaces."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'ray[train]'")
    pytest.importorskip("ray.train.torch", reason="Ray Train is not installed: pip install 'ray[train]'")
    rows = []
    for i in range(2):
        for j, name in enumerate(("image", "reference")):
            picture(64, 64, 2 * i + j).save(tmp_path / f"{name}-{i}.png")
        rows.append({"image": f"image-{i}.png", "references": [f"reference-{i}.png"], "prompt": "a cat"})
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, str(LAUNCHERS / "ray_train.py"), "--workers", "2", "--output", str(tmp_path / "run")]
    command += [f"model={tiny_model}", f"data={tmp_path / 'data.jsonl'}", "fsdp=true", "max_train_steps=2"]
    command += ["resolution=64"]
    if sys.platform == "linux" and os.geteuid() == 0 and shutil.which("unshare"):
        command = ["unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *command]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines()[-1] == f"wrote {tmp_path / 'run'}"
    assert json.loads((tmp_path / "run" / "config.json").read_text())["processes"] == 2
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "run" / LORA_FILE).values())
