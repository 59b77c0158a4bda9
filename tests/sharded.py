"""Runs on one process and on two, for test_sharding.py. Imports once, and forks each process: `python sharded.py FOLDER`.

Writes into FOLDER a run each: `lora-1` and `full-1` on one process, `lora-2` and `full-2` sharded over two, and from the
checkpoint in their middle `lora-1to2`, `lora-2to1` and so on. What a process raises is in `<run>.<rank>.txt`.
"""

import json
import os
import shutil
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from diffusers import Flux2KleinPipeline
from call import CALL
from tiny import build_flux2, picture

from sparse_context.families import find_host
from sparse_context.training.config import TrainConfig
from sparse_context.training.data import Example
from sparse_context.training.dropping import Dropping
from sparse_context.training.finetune import Run, Watch, finetune

CONFIGS = {
    "lora": {
        "rank": 3,
        "lora_alpha": 3,
        "learning_rate": 1e-2,
        "subsets": 2,
        "distillation": 0.0,
        "preservation": 0.5,
        "caption_dropout": 0.3,
        "gradient_checkpointing": True,
        "dropping": Dropping(dense=0.4, overview_factors=(2, 4)),
        "teach": 0.1,
        "teach_heads": ("1.0",),
    },
    "full": {"full": True, "muon_learning_rate": 1e-3, "learning_rate": 1e-3},
}
STEPS, MIDDLE = 4, 2


def example(number: int) -> Example:
    return Example("the cat", (picture(64, 64, number),), picture(64, 64, number + 1), (None,), aligned=True)


def train(folder: Path, processes: int) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True) if processes > 1 else None
    pipe = build_flux2(Flux2KleinPipeline, is_distilled=True)
    pipe.register_to_config(_name_or_path=str(folder.parent))
    host = find_host(pipe, CALL)
    config = TrainConfig(
        max_train_steps=STEPS,
        checkpointing_steps=MIDDLE,
        validation_steps=MIDDLE,
        gradient_accumulation_steps=2 // processes,
        ema=0.9,
        fsdp=processes > 1,
        **CONFIGS[folder.name.partition("-")[0]],
    )
    watch = Watch(validation=[example(100)], log_every=1)
    run = Run(folder, "tiny", "x", resume=True)
    finetune(host, lambda number: [example(number)], run, config, accelerator=accelerator, watch=watch)
    if accelerator is not None:
        accelerator.end_training()


def start(count: int, work: Callable[[], None], log: Path, environment: dict[str, str] | None = None) -> list[int]:
    """The ids of `count` processes that do `work`, with what torchrun would put into their environments."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    found = []
    for rank in range(count):
        child = os.fork()
        if child:
            found.append(child)
            continue
        errors = os.open(f"{log}.{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(errors, 2)
        if count > 1:
            os.environ |= {"WORLD_SIZE": str(count), "RANK": str(rank), "LOCAL_RANK": str(rank)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
        os.environ |= environment or {}
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
    return found


def wait(children: list[int]) -> list[int]:
    """The exit codes; below 0 by a signal."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def go_on(root: Path, source: str, target: str) -> None:
    """Begin a run as the other was in its middle."""
    shutil.copytree(root / source, root / target)
    shutil.rmtree(root / target / f"step-{STEPS:07d}")
    for left in ("pytorch_lora_weights.safetensors", "README.md"):
        (root / target / left).unlink(missing_ok=True)
    shutil.rmtree(root / target / "transformer", ignore_errors=True)


def main(root: Path) -> None:
    import time
    codes = {}
    (root / "call.json").write_text(json.dumps({**CALL, "num_inference_steps": 1}))
    for kind in CONFIGS:
        for name, processes in ((f"{kind}-1", 1), (f"{kind}-2", 2), (f"{kind}-1to2", 2), (f"{kind}-2to1", 1)):
            if "to" in name:
                go_on(root, name.partition("to")[0], name)
            t = time.time()
            codes[name] = wait(start(processes, lambda: train(root / name, processes), root / name))
            print(name, time.time() - t, file=sys.stderr)
    print(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
