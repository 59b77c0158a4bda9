"""Variants of the fine-tuning, and shares of each: the embedded model's quality on validation scenes.

    python runs/ablations.py [--runs sparse sparse-random sparse-truth] [--scales 0.5 1]

The runs are those of runs/train_mini.sh, by the names of their folders. A share of a LoRA is what `--lora-scale` takes
of it: with all tokens the harm grows with the square of the share, since the base had its minimum there, while the gain
with dropped tokens begins with its first power. What is chosen here goes into `adapter --scale`. `auto` is what the
tasks choose by themselves. Stopped at any point, it goes on there. The numbers are PSNR against the truth, inside the
object or, for global edits, of the whole picture; differences are to the dense base with all tokens, scene by scene.

It needs the scenes' objects: `python -m sparse_context.mini data`.
"""

import argparse
import json
from pathlib import Path

from sparse_context.evaluation.evaluate import DENSE, evaluate, fingerprint, grid, maker, summarise
from sparse_context.evaluation.metrics import find_metrics
from sparse_context.generation import NO_LORA, load_pipeline
from sparse_context.mini import adapter_record
from sparse_context.mini.data import load_assets
from sparse_context.mini.samples import FIRST_SEED, scene_samples, tasks_of
from sparse_context.result import write_result
from sparse_context.training.finetune import LORA_FILE

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description="The embedded model's quality after variants of its fine-tuning.")
    parser.add_argument("--runs", nargs="+", default=["sparse"], help="folders in the working folder")
    parser.add_argument("--scales", type=float, nargs="+", default=[0.5, 1.0])
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.2, 0.1])
    parser.add_argument("--scenes", type=int, default=32)
    parser.add_argument("--checkpoints", type=Path, default=ROOT / "checkpoints", help="the working folder")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "ablations.json")
    arguments = parser.parse_args()

    assets = load_assets(arguments.checkpoints / "assets.safetensors").split("validation")
    samples, scenes = scene_samples(assets, arguments.scenes, FIRST_SEED["validation"])
    keeps = (1.0, *arguments.keeps)
    cells = grid(keeps, ("random", "edges", "subject", "mask")) | grid(keeps)
    metrics = find_metrics(["psnr"])

    def measure(name: str, lora: str, scale: float) -> dict[str, list[dict]]:
        """The figures of every scene, by setting."""
        pipe = load_pipeline(lora=lora, lora_scale=scale)
        pipe.set_progress_bar_config(disable=True)
        make = maker(pipe, task_of=lambda sample: tasks_of(scenes[sample.name][0]))
        folder = arguments.checkpoints / arguments.output.stem / name
        evaluate(make, samples, cells, metrics, folder, about={"weights": fingerprint(pipe), "scale": scale})
        files = {cell: folder / "cells" / f"{cell}.json" for cell in cells}
        return {cell: json.loads(file.read_text())["figures"]["samples"] for cell, file in files.items()}

    base = measure("base", NO_LORA, 1.0)
    records, figures = {}, {"base": {"0": summarise(base)}}
    for run in arguments.runs:
        adapter = arguments.checkpoints / run / LORA_FILE
        records[run], figures[run] = adapter_record(adapter), {}
        for scale in arguments.scales:
            rows = measure(f"{run}-{scale:g}", str(adapter), scale)
            rows["all tokens"] = rows.pop(DENSE)
            figures[run][f"{scale:g}"] = groups = summarise({DENSE: base[DENSE]} | rows)
            for group, settings in groups.items():
                score = "psnr" if group == "global edits" else "psnr_in_mask"
                shown = (f"{name} {entry['scores'][score]['difference']:+.2f}" for name, entry in settings.items())
                print(f"{run}, {scale:g} of it, {group}: {', '.join(shown)}", flush=True)
    config = {"split": "validation", "keeps": arguments.keeps, "cells": list(cells), "runs": records}
    write_result(arguments.output, arguments.output.stem, config, figures)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
