"""Runs on one process and on two, for test_sharding.py: `python sharded.py FOLDER` imports once and forks processes.

Writes a run each into FOLDER: `lora-1` and `full-1` on one process, `lora-2` and `full-2` sharded over two, and from
their checkpoints of the middle `lora-1to2` and `full-2to1`. Then, by the command, `whole`, and `killed`: the same with
a process killed in it twice, the second time under torchrun. stdout has the exit codes as JSON; what processes say is
in `<run>.<rank>.txt`.
"""

import json
import os
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
from call import CALL
from diffusers import Flux2KleinPipeline
from tiny import build_flux2, picture
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from sparse_context import cli
from sparse_context.families import find_host
from sparse_context.training.checkpoints import newest_step
from sparse_context.training.config import TrainConfig
from sparse_context.training.data import Example
from sparse_context.training.dropping import Dropping
from sparse_context.training.finetune import Run, Watch, finetune

CONFIGS = {
    "lora": {
        "rank": 3,
        "lora_alpha": 3,
        "subsets": 2,
        "preservation": 0.5,  # a teacher for some batches alone
        "caption_dropout": 0.3,
        "gradient_checkpointing": True,
        "dropping": Dropping(dense=0.4, overview_factors=(2, 4)),
        "teach": 0.1,
        "teach_heads": ("1.0",),
    },
    "full": {"full": True, "muon_learning_rate": 1e-3},
}
STEPS, MIDDLE = 4, 2


def example(number: int) -> Example:
    return Example("the cat", (picture(64, 64, number),), picture(64, 64, number + 1), (None,), aligned=True)


def train(folder: Path, processes: int) -> None:
    """Two batches a step, of one process or of two."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True) if processes > 1 else None
    pipe = build_flux2(Flux2KleinPipeline, is_distilled=True)
    pipe.register_to_config(_name_or_path=str(folder.parent))
    config = TrainConfig(
        max_train_steps=STEPS,
        checkpointing_steps=MIDDLE,
        validation_steps=MIDDLE,
        gradient_accumulation_steps=2 // processes,
        learning_rate=1e-2,
        lr_warmup_steps=0,
        ema=0.9,
        fsdp=processes > 1,
        **CONFIGS[folder.name.partition("-")[0]],
    )
    watch = Watch(validation=[example(100)], log_every=1)
    run = Run(folder, "tiny", "x", resume=True)
    finetune(find_host(pipe, CALL), lambda n: [example(n)], run, config, accelerator=accelerator, watch=watch)
    if accelerator is not None:
        accelerator.end_training()


def command(root: Path, folder: Path) -> None:
    """`sparse-context train`, sharded."""
    with (root / f"{folder.name}.pids").open("a") as file:
        file.write(f"{os.environ['RANK']} {os.getpid()}\n")
    sys.argv = ["sparse-context", "train", "--data", str(root / "data.jsonl"), "--model", str(root)]
    sys.argv += ["--output-dir", str(folder), "--resume", "latest", "--max-train-steps", "12", "--resolution", "64"]
    sets = ["checkpointing_steps=2", "ema=0.9", *([] if "ACCELERATE_USE_FSDP" in os.environ else ["fsdp=true"])]
    for setting in sets:
        sys.argv += ["--set", setting]
    cli.main()


def start(log: Path, work: Callable[[], None], **environment: str) -> int:
    """The id of a process that does `work`."""
    if child := os.fork():
        return child
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.environ |= environment
    code = 1
    try:
        work()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def start_two(folder: Path, work: Callable[[], None], **more: str) -> list[int]:
    """Two processes, with what a launcher puts into their environments."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **more}
    return [
        start(folder.with_name(f"{folder.name}.{rank}.txt"), work, RANK=str(rank), LOCAL_RANK=str(rank), **shared)
        for rank in (0, 1)
    ]


def torchrun(work: Callable[[], None]) -> None:
    """What `torchrun --standalone --nproc-per-node 2 --max-restarts 1` does, with processes that are forked."""
    settings = LaunchConfig(
        1,
        1,
        2,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=1,
        start_method="fork",
        local_addr="127.0.0.1",
    )

    def worker() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # which is the agent's, in a fork
        work()

    elastic_launch(settings, worker)()


def wait(children: list[int]) -> list[int]:
    """The exit codes; below 0 by a signal."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def kill_one(root: Path, folder: Path, step: int) -> None:
    """Kill the second process that was started last as soon as there is a checkpoint of that step."""
    while newest_step(folder) < step:
        time.sleep(0.005)
    pids = [line.split() for line in (root / f"{folder.name}.pids").read_text().splitlines()]
    os.kill(int([pid for rank, pid in pids if rank == "1"][-1]), signal.SIGKILL)


def go_on(source: Path, target: Path) -> None:
    """Begin a run as the other was in its middle."""
    for name in ("config.json", "log.jsonl", f"step-{MIDDLE:07d}"):
        copy = shutil.copytree if (source / name).is_dir() else shutil.copy
        target.mkdir(exist_ok=True)
        copy(source / name, target / name)


def main(root: Path) -> None:
    cv2.setNumThreads(0)  # whose threads a fork would leave behind
    pipe = build_flux2(Flux2KleinPipeline, is_distilled=True)
    pipe.save_pretrained(root)
    (root / "call.json").write_text(json.dumps({**CALL, "num_inference_steps": 1}))
    rows = []
    for i in range(5):
        for j, name in enumerate(("image", "reference")):
            picture(64, 64, 2 * i + j).save(root / f"{name}-{i}.png")
        rows.append({"image": f"image-{i}.png", "references": [f"reference-{i}.png"], "prompt": f"a cat {i}"})
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    codes = {}
    began = time.time()

    def note(name):
        print(name, round(time.time() - began, 1), file=sys.stderr)

    for kind in CONFIGS:
        train(root / f"{kind}-1", 1)  # here, so that what it imports is there for all others
        note(kind)
        codes[f"{kind}-2"] = wait(start_two(root / f"{kind}-2", partial(train, root / f"{kind}-2", 2)))
        note(kind + "2")
    go_on(root / "lora-1", root / "lora-1to2")
    codes["lora-1to2"] = wait(start_two(root / "lora-1to2", partial(train, root / "lora-1to2", 2)))
    note("1to2")
    go_on(root / "full-2", root / "full-2to1")
    train(root / "full-2to1", 1)
    note("2to1")

    whole, killed = root / "whole", root / "killed"
    # What accelerate's config of FSDP comes to; by the last, transformers would load weights in one process alone
    config = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    codes["whole"] = wait(start_two(whole, partial(command, root, whole), **config))
    note("whole")
    children = start_two(killed, partial(command, root, killed))
    kill_one(root, killed, 2)
    codes["killed"] = wait(children)
    note("killed")
    agent = start(root / "torchrun.txt", partial(torchrun, partial(command, root, killed)))
    kill_one(root, killed, 6)
    codes["torchrun"] = wait([agent])
    note("torchrun")
    print(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
