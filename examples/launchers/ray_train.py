"""One run by Ray Train, with settings of `sparse-context train`:

    python examples/launchers/ray_train.py --workers 8 --gpu --output /shared/my-lora \\
        model=black-forest-labs/FLUX.2-klein-base-9B data=/shared/train.jsonl fsdp=true mixed_precision=bf16

It joins the cluster at RAY_ADDRESS, or starts Ray on this machine. All machines need the same paths, and Ray listens on
all interfaces, so it belongs in a closed network. Where a process dies, Ray starts all of them again, and the run goes
on from its last checkpoint. pip install 'ray[train]'.
"""

import argparse
from pathlib import Path

from sparse_context.batch.cluster import connected


def work(given: dict) -> None:
    """What each process does. Ray Train has joined them already."""
    from sparse_context.training.launch import launch
    from sparse_context.training.options import read_settings

    flags = {name: given["named"].get(name) for name in ("model", "data")}
    settings = read_settings(sets=given["sets"], flags=flags)
    launch(settings.model, settings.data, Path(given["output"]), settings.config, settings.run, resume="latest")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--gpu", action="store_true", help="a GPU for each")
    parser.add_argument("--restarts", type=int, default=3, help="how many deaths a run survives")
    parser.add_argument("--output", type=Path, required=True, help="the folder of the run")
    parser.add_argument("settings", nargs="+", help="model=..., data=..., and any field=value")
    given = parser.parse_args()

    named = dict(pair.split("=", 1) for pair in given.settings if pair.startswith(("model=", "data=")))
    sets = [pair for pair in given.settings if not pair.startswith(("model=", "data="))]
    output = given.output.resolve()
    with connected(given.workers + 1):
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        TorchTrainer(
            work,
            train_loop_config={"named": named, "sets": sets, "output": str(output)},
            torch_config=TorchConfig(backend="nccl" if given.gpu else "gloo"),
            scaling_config=ScalingConfig(num_workers=given.workers, use_gpu=given.gpu),
            run_config=RunConfig(
                name=output.name,
                storage_path=str(output.with_name(f"{output.name}-ray")),
                failure_config=FailureConfig(max_failures=given.restarts),
            ),
        ).fit()
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
