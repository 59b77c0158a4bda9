"""A training step of the embedded model as it was and as it is, against what matrix products reach; and a sparse one
against a dense one.

    python runs/training_speed.py [--turns 5] [--kinds KIND ...] [--assets FILE] [--output FILE]
    OMP_NUM_THREADS=1 python runs/training_speed.py --processor-time    # on a busy machine

Each way of taking a step is a process of its own (training_steps.py): the code of an older commit, today's as
`sparse-context train` runs it, and today's with compiled blocks. All are fed the same batches, and take their steps in
turns with each other and with plain products, so that a machine that slows down does so for all of them. The first turn
is the warm-up. The type is bfloat16 where the CPU has instructions for it, else float32.

The peak is what a product of two large matrices reaches in the same turn. Operations are those of all matrix products
and convolutions of a step, counted by torch. A step's phases are the encoders' forwards, the optimisers, and all else,
which is the transformer and the loss.

A kind's figures are written when they are there, and those of kinds that were not asked for stay as they are, as long
as they were measured with the same settings.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tables import draw, read, speedup, table
from tqdm import tqdm
from training_steps import CLOCKS, KEEP, KINDS

from sparse_context.bench.figures import Spread
from sparse_context.result import checkout, write_result
from sparse_context.training.precision import has_fast_bfloat16

ROOT = Path(__file__).resolve().parents[1]
BEFORE = "80f9de9e6ca4f14a3b938394e516f9c576b62e44"
WAYS = ("before", "now", "compiled")
SPARSE = ("dense", "sparse")
RACES = [kind for kind in KINDS if kind not in SPARSE]
LEAST = 2.0  # times that a sparse step is to be faster than a dense one
LARGE = 2048
TOKENS = 4 * (32 + 256 + 128)  # of four samples: a prompt, an output and half of a reference
PRODUCTS = {
    "large": ((LARGE, LARGE), (LARGE, LARGE)),
    "into a block": ((TOKENS, 256), (256, 2304)),
    "out of a block": ((TOKENS, 1024), (1024, 256)),
    "gradient of weights": ((2304, TOKENS), (TOKENS, 256)),
}
"""Products of matrices by their shapes: a large one, and those that the embedded model's blocks consist of."""
PHASES = ("step", "encoders", "transformer", "optimiser")

Step = dict[str, float]
"""What a step takes, whole and by phase: seconds or operations."""


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


@contextmanager
def worker(way: str, kind: str, settings: argparse.Namespace, code: Path) -> Iterator[subprocess.Popen]:
    """A process that takes steps one way. With code of another folder, that goes before what is installed."""
    command = [sys.executable, str(ROOT / "runs" / "training_steps.py"), way, kind, settings.clock]
    process = subprocess.Popen(
        [*command, str(settings.assets), *(["--bfloat16"] if settings.bfloat16 else [])],
        env=os.environ | {"PYTHONPATH": str(code)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
    )
    with process:
        try:
            yield process
        finally:
            process.kill()  # it trains until then


def next_step(process: subprocess.Popen) -> Step:
    """What the next step of a worker takes."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    for line in process.stdout:
        if line.startswith("{"):  # others are somebody else's
            found = {"encoders": 0.0, "optimiser": 0.0, **json.loads(line)}
            return found | {"transformer": found["step"] - found["encoders"] - found["optimiser"]}
    raise RuntimeError(f"{process.args} ended with code {process.wait()}.")


def products(settings: argparse.Namespace, times: int = 3) -> dict[str, float]:
    """Operations a second of each of `PRODUCTS`, over some of them after a first."""
    rates, now = {}, CLOCKS[settings.clock]
    dtype = torch.bfloat16 if settings.bfloat16 else torch.float32
    for name, (left, right) in PRODUCTS.items():
        one, other = torch.randn(left).to(dtype), torch.randn(right).to(dtype)
        out = torch.empty(*left[:-1], right[-1], dtype=dtype)
        torch.matmul(one, other, out=out)
        start = now()
        for _ in range(times):
            torch.matmul(one, other, out=out)
        rates[name] = times * 2 * out.numel() * left[-1] / (now() - start)
    return rates


def race(
    runners: Mapping[str, tuple[str, str]], settings: argparse.Namespace, before: Path, label: str
) -> tuple[dict[str, list[Step]], list[dict[str, float]]]:
    """Steps of each runner, taken in turns, and what products reached in each turn. runners: name -> way and kind."""
    with ExitStack() as stack:
        processes = {
            name: stack.enter_context(worker(way, kind, settings, before if way == "before" else ROOT))
            for name, (way, kind) in runners.items()
        }
        steps: dict[str, list[Step]] = {name: [] for name in runners}
        peaks = []
        for turn in tqdm(range(settings.turns + 1), desc=label, unit="turn"):
            peaks.append(products(settings))
            for name, process in processes.items():
                step = next_step(process)
                if turn:
                    steps[name].append(step)
    return steps, peaks[1:]


def measure(kind: str, settings: argparse.Namespace, before: Path) -> dict[str, Any]:
    """The figures of one kind of training."""
    with worker("count", kind, settings, ROOT) as counting:
        operations = [next_step(counting) for _ in range(settings.turns + 1)][1:]
    ways = [way for way in WAYS if way in settings.ways]
    steps, peaks = race({way: (way, kind) for way in ways}, settings, before, kind)
    return {
        "seconds": {
            way: {phase: [round(step[phase], 4) for step in each] for phase in PHASES} for way, each in steps.items()
        },
        "gflop": {phase: [round(each[phase] / 1e9, 1) for each in operations] for phase in PHASES},
        "gflops_of_products": {name: round(median(turn[name] for turn in peaks) / 1e9, 1) for name in PRODUCTS},
        "share_of_peak": {
            way: {
                phase: round(
                    median(o[phase] / s[phase] / p["large"] for o, s, p in zip(operations, each, peaks, strict=True)), 3
                )
                for phase in PHASES
                if all(step[phase] for step in each)
            }
            for way, each in steps.items()
        },
        "share_of_step": {
            way: {phase: round(median(step[phase] / step["step"] for step in each), 3) for phase in PHASES[1:]}
            for way, each in steps.items()
        },
        "speedup": {way: faster(steps["before"], steps[way]) for way in ways if way != "before"},
    }


def measure_sparse(settings: argparse.Namespace, before: Path) -> dict[str, Any]:
    """A step with dropped references against one with all of them."""
    steps, _ = race({kind: ("now", kind) for kind in SPARSE}, settings, before, "sparse")
    ratio = faster(*steps.values())
    return {
        "seconds": {kind: [round(step["step"], 4) for step in each] for kind, each in steps.items()},
        "speedup": ratio,
        "reached": {f"{LEAST}x": ratio["median"] >= LEAST},
    }


def faster(slow: list[Step], fast: list[Step]) -> dict[str, float]:
    """How many times faster steps are than others, turn by turn."""
    ratios = sorted(one["step"] / other["step"] for one, other in zip(slow, fast, strict=True))
    return {"median": round(median(ratios), 3), "min": round(ratios[0], 3), "max": round(ratios[-1], 3)}


def training_share() -> str:
    """How much faster a step is than it was, its share of what products reach, and where its time goes."""
    rows = []
    for kind, figures in read("training_speed")["figures"].items():
        if kind in SPARSE:
            continue
        for way, share in figures["share_of_peak"].items():
            ratio = speedup(Spread(**figures["speedup"][way])) if way in figures["speedup"] else ""
            peak = [f"{share[phase]:.0%}" for phase in PHASES[:3]]
            time = [f"{figures['share_of_step'][way][phase]:.0%}" for phase in PHASES[1:]]
            rows.append([kind, way, ratio, *peak, *time])
    shares = [f"of the peak: {phase}" for phase in PHASES[:3]] + [f"of the time: {phase}" for phase in PHASES[1:]]
    return table(["training", "code", "speed-up", *shares], rows)


def training_speed() -> str:
    """How many times faster a sparse step of fine-tuning is than a dense one."""
    figures = read("training_speed")["figures"]["sparse"]
    cells = [str(KINDS["sparse"].references), f"{KEEP:g}", speedup(Spread(**figures["speedup"]))]
    return table(["references", "keep", "speed-up of a step"], [cells])


TABLES = {
    "training_share": training_share,
    "training_speed": training_speed,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="A training step as it was and as it is, against the peak.")
    parser.add_argument("--before", default=BEFORE, help="the older commit")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--kinds", nargs="+", choices=[*RACES, "sparse"], default=[*RACES, "sparse"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="beside the older code")
    parser.add_argument("--assets", type=Path, default=ROOT / "checkpoints" / "assets.safetensors")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "training_speed.json")
    parser.add_argument("--table", action="store_true", help="only draw the tables of results/ again, from the JSON")
    parser.add_argument("--processor-time", action="store_true", help="instead of seconds; with OMP_NUM_THREADS=1")
    settings = parser.parse_args()
    checkout()  # of the code that runs, whatever is committed meanwhile
    if settings.table:
        return draw(TABLES)
    settings.clock = "processor" if settings.processor_time else "wall"
    settings.bfloat16 = has_fast_bfloat16("cpu")
    settings.ways = {"before", *settings.ways}
    about = {
        "before": settings.before,
        "keep": KEEP,
        "batch": {kind: KINDS[kind].batch for kind in KINDS},
        "dtype": "bfloat16" if settings.bfloat16 else "float32",
        "turns": settings.turns,
        "clock": settings.clock,
        "threads": torch.get_num_threads(),
    }
    figures: dict[str, Any] = {}
    if settings.output.is_file():
        earlier = json.loads(settings.output.read_text(encoding="utf-8"))
        if earlier["config"] == about and earlier["commit"] == checkout()["commit"]:
            figures = earlier["figures"]
    with worktree(settings.before) as before:
        for kind in settings.kinds:
            began = time.perf_counter()
            measured = measure_sparse(settings, before) if kind == "sparse" else measure(kind, settings, before)
            figures[kind] = measured
            write_result(settings.output, "training_speed", about, figures)
            print(f"{kind}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    draw(TABLES)


if __name__ == "__main__":
    main()
