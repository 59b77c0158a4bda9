"""How much of a fine-tuned LoRA to take: the embedded model's quality at shares of it, on validation scenes.

    python runs/adapter_scale.py [--adapter checkpoints/sparse/pytorch_lora_weights.safetensors]

Share 0 is the dense base. With all tokens the harm grows with the square of the share, since the base had its minimum
there, while the gain with dropped ones begins with its first power: a part of the LoRA may be better than the whole.
What is chosen here goes into `python -m sparse_context.mini adapter --scale`. Stopped at any point, it goes on there.
The numbers are PSNR against the truth, inside the object or, for global edits, of the whole picture; differences are to
the dense base with all tokens, scene by scene.

It needs the scenes' objects: `python -m sparse_context.mini data`.
"""

import argparse
import json
from pathlib import Path

from sparse_context.evaluation.evaluate import DENSE, evaluate, fingerprint, grid, maker, summarise
from sparse_context.evaluation.metrics import find_metrics
from sparse_context.generation import load_pipeline
from sparse_context.mini import adapter_record
from sparse_context.mini.data import load_assets
from sparse_context.mini.samples import FIRST_SEED, scene_samples, tasks_of
from sparse_context.result import write_result
from sparse_context.training.finetune import LORA_FILE

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description="The embedded model's quality at shares of a LoRA.")
    parser.add_argument("--adapter", type=Path, default=ROOT / "checkpoints" / "sparse" / LORA_FILE)
    parser.add_argument("--scales", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75, 1.0], help="the first is 0")
    parser.add_argument("--keep", type=float, default=0.2)
    parser.add_argument("--scenes", type=int, default=32)
    parser.add_argument("--assets", type=Path, default=ROOT / "checkpoints" / "assets.safetensors")
    parser.add_argument("--folder", type=Path, default=ROOT / "checkpoints" / "adapter_scale", help="working folder")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "adapter_scale.json")
    arguments = parser.parse_args()

    samples, scenes = scene_samples(
        load_assets(arguments.assets).split("validation"), arguments.scenes, FIRST_SEED["validation"]
    )
    pipe = load_pipeline(lora=str(arguments.adapter))
    pipe.set_progress_bar_config(disable=True)
    make = maker(pipe, task_of=lambda sample: tasks_of(scenes[sample.name][0]))
    cells = grid((1.0, arguments.keep), ("random", "uniform", "edges", "saliency"))
    about = {"adapter": adapter_record(arguments.adapter), "weights": fingerprint(pipe)}
    rows = {}
    for scale in arguments.scales:
        pipe.set_adapters(pipe.get_active_adapters(), scale)
        folder = arguments.folder / f"{scale:g}"
        evaluate(make, samples, cells, find_metrics(["psnr"]), folder, about=about | {"scale": scale})
        for cell in cells:
            rows[scale, cell] = json.loads((folder / "cells" / f"{cell}.json").read_text())["figures"]["samples"]
    base = rows[0.0, DENSE]
    figures = {f"{scale:g}": summarise({DENSE: base, "all tokens": rows[scale, DENSE]}
                                       | {cell: rows[scale, cell] for cell in cells if cell != DENSE})
               for scale in arguments.scales}  # fmt: skip
    config = about | {"split": "validation", "keep": arguments.keep, "cells": list(cells)}
    write_result(arguments.output, arguments.output.stem, config, figures)
    for scale, groups in figures.items():
        for group, settings in groups.items():
            score = "psnr" if group == "global edits" else "psnr_in_mask"
            shown = (f"{name} {entry['scores'][score]['difference']:+.2f}" for name, entry in settings.items())
            print(f"scale {scale}, {group}: {', '.join(shown)}")
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
