"""A step of fine-tuning with dropped references against one with all of them: the embedded model, four references.

    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8589934592 python runs/time_training.py [--turns 5] [--output FILE]

A step is all that the trainer does for one: encoding the pictures, choosing the tokens, the forward and backward pass
in bfloat16, and the optimiser, on a LoRA. Both kinds run in turns on the same four samples with four references each;
the first turn is the warm-up. The figure to reach at keep 0.35 is twice as fast. The two variables keep glibc from
giving memory back to the system: without them the larger step pays far more for memory that is mapped anew,
and the ratio says more of that than of the work. The record says whether they were set.
"""

import argparse
import os
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from tables import draw, read, speedup, table
from tqdm import tqdm

from recipes.mini.sparse import LORA
from sparse_context.bench.figures import Spread
from sparse_context.embedded.demo import read_examples
from sparse_context.families import find_host
from sparse_context.pipelines.load import load
from sparse_context.pipelines.lora_file import NO_LORA
from sparse_context.pipelines.settings import call_settings
from sparse_context.pipelines.spec import ModelSpec
from sparse_context.result import checkout, write_result
from sparse_context.training.data import Example
from sparse_context.training.dropping import Dropping
from sparse_context.training.loss import FlowMatching
from sparse_context.training.trainable import prepare

ROOT = Path(__file__).resolve().parents[1]
KEEP, BATCH, LEAST = 0.35, 4, 2.0
KINDS = {
    "dense": Dropping(dense=1.0),
    "sparse": Dropping(keep_min=KEEP, keep_max=KEEP, dense=0.0, mix={"random": 1.0}),
}


def training_speed() -> str:
    """How many times faster a sparse step of fine-tuning is than a dense one."""
    result = read("training_speed")
    config = result["config"]
    cells = [str(config["references"]), f"{config['keep']:g}", speedup(Spread(**result["figures"]["speedup"]))]
    return table(["references", "keep", "speed-up of a step"], [cells])


TABLES = {
    "training_speed": training_speed,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="A training step with dropped references against one with all.")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "training_speed.json")
    parser.add_argument("--table", action="store_true", help="only draw the tables of results/ again, from the JSON")
    arguments = parser.parse_args()
    checkout()  # of the code that runs, whatever is committed meanwhile
    if arguments.table:
        return draw(TABLES)

    scene = next(e for e in read_examples() if len(e["references"]) == 4)
    example = Example(scene["prompt"], tuple(scene["references"]), scene["truth"], (None,) * 4)
    pipe = load(ModelSpec(dtype="float32", device="cpu", lora=NO_LORA))
    host = find_host(pipe, call_settings(pipe))
    trained = prepare(host, LORA)
    optimiser = torch.optim.AdamW(trained.parameters(), lr=1e-5)

    def autocast() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16)

    config = replace(LORA, subsets=1, distillation=0.0, preservation=0.0)  # a step without a teacher
    losses = {
        name: FlowMatching(
            host, lambda number: [example] * BATCH, replace(config, dropping=dropping), autocast=autocast
        )
        for name, dropping in KINDS.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in KINDS}
    for turn in tqdm(range(arguments.turns + 1), desc="turns"):
        for name, loss in losses.items():
            start = time.perf_counter()
            loss(turn).backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            if turn:
                seconds[name].append(round(time.perf_counter() - start, 4))
    ratios = sorted(d / s for d, s in zip(seconds["dense"], seconds["sparse"], strict=True))
    faster = {"median": round(median(ratios), 3), "min": round(ratios[0], 3), "max": round(ratios[-1], 3)}
    print(f"{faster['median']:.2f}x ({faster['min']:.2f} to {faster['max']:.2f})")
    about = {
        "keep": KEEP,
        "references": 4,
        "batch": BATCH,
        "rank": LORA.rank,
        "dtype": "bfloat16",
        "turns": arguments.turns,
        "threads": torch.get_num_threads(),
        "memory_is_reused": os.environ.get("MALLOC_MMAP_MAX_") == "0",
    }
    figures = {"seconds": seconds, "speedup": faster, "reached": {f"{LEAST}x": faster["median"] >= LEAST}}
    write_result(arguments.output, "training_speed", about, figures)
    draw(TABLES)


if __name__ == "__main__":
    main()
