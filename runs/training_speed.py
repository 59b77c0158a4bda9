"""A training step of the embedded model as it was and as it is, against what bf16 matrix products reach.

    python runs/training_speed.py [--before COMMIT] [--turns 5] [--kinds KIND ...] [--output FILE]
    OMP_NUM_THREADS=1 python runs/training_speed.py --processor-time    # on a busy machine

Each way of taking a step is a process of its own: the code of an older commit, today's, and today's with compiled
blocks. All run `finetune`, as `sparse-context train` does, on the same batches of the demo's scenes with one reference,
and take their steps in turns with each other and with plain products, so that a machine that slows down does so for all
of them. The first turn is the warm-up; with compiled blocks it is where they are compiled. Floating point operations
are those of all matrix products and convolutions of a step, counted by torch in the older code. The peak is what a
product of two large bf16 matrices reaches in the same run.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tables import draw, read, speedup, table
from tqdm import tqdm

from recipes.mini.sparse import FULL, LORA
from sparse_context.bench.figures import Spread
from sparse_context.embedded.demo import read_examples
from sparse_context.families import find_host
from sparse_context.pipelines.load import load
from sparse_context.pipelines.lora_file import NO_LORA
from sparse_context.pipelines.settings import call_settings
from sparse_context.pipelines.spec import ModelSpec
from sparse_context.result import checkout, write_result
from sparse_context.training.config import TrainConfig
from sparse_context.training.data import Example
from sparse_context.training.finetune import Run, Watch, finetune

ROOT = Path(__file__).resolve().parents[1]
BEFORE = "5885f7f921e2cd1afc4138c543c94e0d5c479885"
WAYS = ("before", "now", "compiled")
BATCH = 8
KINDS = {
    "LoRA": TrainConfig(rank=64, lora_alpha=64),
    "LoRA, teacher and three sets a batch": replace(LORA, gradient_accumulation_steps=1),
    "all weights, Muon": replace(FULL, subsets=1, gradient_accumulation_steps=1),
}
LARGE = 2048
TOKENS = 32 + 256 + 128  # a prompt, an output and half of a reference
PRODUCTS = {
    "large": ((LARGE, LARGE), (LARGE, LARGE)),
    "into a block": ((BATCH * TOKENS, 256), (256, 2304)),
    "out of a block": ((BATCH * TOKENS, 1024), (1024, 256)),
    "gradient of weights": ((2304, BATCH * TOKENS), (BATCH * TOKENS, 256)),
    "attention scores": ((4, TOKENS, 64), (4, 64, TOKENS)),
}
"""Products of bf16 matrices by their shapes: a large one, and those that the embedded model's blocks consist of."""


# One way, in a process of its own -------------------------------------------------------------------------------------


def batches(number: int) -> list[Example]:
    """Scenes of the demo with one reference."""
    scenes = [scene for scene in read_examples() if len(scene["references"]) == 1]
    taken = [scenes[(BATCH * number + i) % len(scenes)] for i in range(BATCH)]
    side = taken[0]["references"][0].size
    return [
        Example(scene["prompt"], (scene["references"][0].resize(side),), scene["truth"], (None,)) for scene in taken
    ]


CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


def work(way: str, kind: str, steps: int, clock: str) -> None:
    """Take steps, each when a line comes in; a line goes out with its seconds, or with all operations for "count"."""
    from accelerate import Accelerator

    config = replace(KINDS[kind], max_train_steps=steps, checkpointing_steps=steps, validation_steps=0)
    if way in ("now", "compiled"):
        from sparse_context.training.memory import keep_freed_memory

        keep_freed_memory()
    if way == "compiled":
        config = replace(config, compile=True)
    pipe = load(ModelSpec(dtype="float32", device="cpu", lora=NO_LORA))
    host = find_host(pipe, call_settings(pipe))
    counter, now = flop_counter(), CLOCKS[clock]
    wait_for_turn()
    began = now()

    def log(step: int, record: dict[str, float]) -> None:
        nonlocal began
        figure = counter.get_total_flops() if way == "count" else now() - began
        print(json.dumps(figure), flush=True)
        if step < steps:
            wait_for_turn()
        began = now()

    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        if way == "count":
            stack.enter_context(counter)
        finetune(
            host,
            batches,
            Run(Path(folder) / "run", "embedded", "demo"),
            config,
            accelerator=Accelerator(mixed_precision="bf16", cpu=True),
            watch=Watch(log=log, log_every=1),
        )


def wait_for_turn() -> None:
    """End the process where the one that asks for steps is gone."""
    if not sys.stdin.readline():
        sys.exit(1)


Shape = tuple[int, ...]


def flop_counter() -> Any:
    """torch's own, which does not know the fused attention of CPUs."""
    from torch.utils.flop_counter import FlopCounterMode

    def forward(query: Shape, key: Shape, *rest: Any, **named: Any) -> int:
        return 4 * prod(query) * key[2]

    def backward(gradient: Shape, query: Shape, key: Shape, *rest: Any, **named: Any) -> int:
        return 10 * prod(query) * key[2]

    fused = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: forward,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    return FlopCounterMode(display=False, custom_mapping=fused)


# All of them, in turns ------------------------------------------------------------------------------------------------


@contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """The code of a commit, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "before"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(place), commit], check=True)
        try:
            yield place
        finally:
            subprocess.run([*git, "remove", "--force", str(place)], check=True)


class Worker:
    """A process that takes steps one way. With code of another folder, that goes before what is installed."""

    def __init__(self, way: str, kind: str, steps: int, clock: str, code: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", way, kind, str(steps), clock],
            env=os.environ | {"PYTHONPATH": str(code)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def step(self) -> float:
        """The figure of the next step."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            try:
                return float(line)
            except ValueError:
                continue  # somebody else's line
        raise RuntimeError(f"{self.process.args} ended with code {self.process.wait()}.")


def products(clock: str, turns: int = 3) -> dict[str, float]:
    """Operations a second of each of `PRODUCTS`, the best of some turns."""
    rates, now = {}, CLOCKS[clock]
    for name, (left, right) in PRODUCTS.items():
        one, other = torch.randn(left).bfloat16(), torch.randn(right).bfloat16()
        out = torch.empty(*left[:-1], right[-1], dtype=torch.bfloat16)
        seconds = []
        for _ in range(turns + 1):
            start = now()
            torch.matmul(one, other, out=out)
            seconds.append(now() - start)
        rates[name] = 2 * out.numel() * left[-1] / min(seconds[1:])
    return rates


def measure(kind: str, turns: int, clock: str, before: Path) -> dict[str, Any]:
    """The figures of one kind of training."""
    steps = turns + 1
    counting = Worker("count", kind, steps, clock, before)
    totals = [counting.step() for _ in range(steps)]
    counting.process.wait()
    operations = [after - earlier for after, earlier in zip(totals, [0, *totals[:-1]], strict=True)][1:]
    workers = {way: Worker(way, kind, steps, clock, before if way == "before" else ROOT) for way in WAYS}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    peaks = []
    for _ in tqdm(range(steps), desc=kind, unit="turn"):
        peaks.append(products(clock))
        for way, worker in workers.items():
            seconds[way].append(worker.step())
    for worker in workers.values():
        worker.process.wait()
    first = {way: round(each.pop(0), 2) for way, each in seconds.items()}
    peak = {name: median(turn[name] for turn in peaks) for name in PRODUCTS}
    return {
        "seconds": {way: [round(second, 4) for second in each] for way, each in seconds.items()},
        "first_step": first,
        "gflop": [round(each / 1e9, 1) for each in operations],
        "gflops_of_products": {name: round(rate / 1e9, 1) for name, rate in peak.items()},
        "share_of_peak": {
            way: round(median(o / s for o, s in zip(operations, each, strict=True)) / peak["large"], 3)
            for way, each in seconds.items()
        },
        "speedup": {
            way: spread([b / s for b, s in zip(seconds["before"], each, strict=True)])
            for way, each in seconds.items()
            if way != "before"
        },
    }


def spread(ratios: list[float]) -> dict[str, float]:
    return {"median": round(median(ratios), 3), "min": round(min(ratios), 3), "max": round(max(ratios), 3)}


def training_share() -> str:
    """How much faster a step is than it was, and its share of what bf16 products reach."""
    rows = []
    for kind, figures in read("training_share")["figures"].items():
        share = [f"{figures['share_of_peak'][way]:.0%}" for way in WAYS]
        faster = [speedup(Spread(**figures["speedup"][way])) for way in WAYS[1:]]
        rows.append([kind, share[0], share[1], faster[0], share[2], faster[1]])
    return table(["training", "before", "now", "speed-up", "compiled", "speed-up"], rows)


TABLES = {
    "training_share": training_share,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="A training step as it was and as it is, against the peak.")
    parser.add_argument("--before", default=BEFORE, help="the older commit")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "training_share.json")
    parser.add_argument("--table", action="store_true", help="only draw the tables of results/ again, from the JSON")
    parser.add_argument("--processor-time", action="store_true", help="instead of seconds; with OMP_NUM_THREADS=1")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        way, kind, steps, clock = arguments.worker
        return work(way, kind, int(steps), clock)
    checkout()  # of the code that runs, whatever is committed meanwhile
    if arguments.table:
        return draw(TABLES)
    clock = "processor" if arguments.processor_time else "wall"
    with worktree(arguments.before) as before:
        figures = {kind: measure(kind, arguments.turns, clock, before) for kind in arguments.kinds}
    about = {
        "before": arguments.before,
        "batch": BATCH,
        "references": 1,
        "dtype": "bfloat16",
        "turns": arguments.turns,
        "clock": clock,
        "threads": torch.get_num_threads(),
    }
    write_result(arguments.output, "training_share", about, figures)
    draw(TABLES)
    print(training_share())


if __name__ == "__main__":
    main()
