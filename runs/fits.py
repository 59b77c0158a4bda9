"""What a LoRA fits into, at the shapes of real models: computed, and checked on a CPU with few blocks of true width.

    python runs/fits.py

A step is one of `sparse-context train` with `gradient_checkpointing=true`, latents and texts cached (so that no encoder
is loaded), a LoRA of rank 16 in bf16 mixed precision, a batch of one with all tokens. Its memory is computed from
shapes (training/predict.py). To check that, steps are made with one block of each kind and random weights in float32,
and of the whole embedded model, and the bytes are counted that tensors take at once beside the weights.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tables import draw, read, table

from sparse_context.bench.shapes import SHAPES
from sparse_context.families.shape import Shape, Tokens, with_blocks
from sparse_context.pipelines.dry import DryRun
from sparse_context.pipelines.embedded import WEIGHTS
from sparse_context.pipelines.hub import class_name_of
from sparse_context.pipelines.predict import ROOM, Parts, parts_of_model, parts_of_shape
from sparse_context.result import checkout, write_result
from sparse_context.training.config import TrainConfig
from sparse_context.training.predict import Plan, StepPredictor, host_of
from sparse_context.training.trainable import prepare

ROOT = Path(__file__).resolve().parents[1]
GB = 10**9
MEMORY = (16, 24, 48, 80)
BASES = (None, "int8", "nf4")
CONFIG = TrainConfig(rank=16, lora_alpha=16, gradient_checkpointing=True)
CLASSES = {
    "klein-4b": "Flux2KleinPipeline",
    "klein-9b": "Flux2KleinPipeline",
    "kontext": "FluxKontextPipeline",
    "qwen-edit": "QwenImageEditPlusPipeline",
}
NAMES = {
    "klein-4b": "FLUX.2 klein 4B",
    "klein-9b": "FLUX.2 klein 9B",
    "kontext": "FLUX.1 Kontext",
    "qwen-edit": "Qwen-Image-Edit-Plus",
}
ROWS = (
    *((name, count, side) for name in ("klein-4b", "klein-9b") for side in (512, 1024) for count in (1, 4)),
    ("kontext", 1, 1024),
    ("qwen-edit", 1, 1024),
)


def transformer_alone(shape: Shape) -> Parts:
    """Its parts without the encoders."""
    parts = parts_of_shape(replace(shape, encoder={}), torch.bfloat16)
    return replace(
        parts,
        modules={"transformer": parts.modules["transformer"]},
        weights={"transformer": parts.weights["transformer"]},
    )


def compute() -> list[dict[str, Any]]:
    predictors = {
        (name, base): StepPredictor(
            transformer_alone(SHAPES[name]), CLASSES[name], CONFIG, Plan(base, mixed=torch.bfloat16)
        )
        for name in CLASSES
        for base in BASES
    }
    rows = []
    for name, count, side in ROWS:
        grid = (side // SHAPES[name].token,) * 2
        steps = {base or "bf16": predictors[name, base]([grid] * count, 1.0, grid) for base in BASES}
        rows.append(
            {
                "model": name,
                "references": count,
                "side": side,
                "tokens": steps["bf16"].tokens.total,
                "steps": {base: step.to_dict() for base, step in steps.items()},
            }
        )
    return rows


class Real(DryRun):
    """The same count of what is computed, with attention as it is."""

    def __enter__(self) -> "Real":
        return super(DryRun, self).__enter__()

    def __exit__(self, *error: Any) -> None:
        super(DryRun, self).__exit__(*error)


def measure(parts: Parts, class_name: str, transformer: Any, tokens: Tokens) -> dict[str, Any]:
    """What a step takes beside the weights: predicted, and what its tensors took."""
    plan = Plan(device="cpu")
    grid = (1, tokens.output)
    predicted = StepPredictor(parts, class_name, CONFIG, plan)([(1, tokens.references)], 1.0, grid)
    prepare(host_of(class_name, transformer), CONFIG)
    given = parts.shape.kind.arguments(transformer, parts.shape, tokens, None)
    with Real() as run:
        torch.autograd.backward(transformer(**given, return_dict=False)[0].float().square().mean())
    inputs = sum(value.nbytes for value in given.values() if isinstance(value, torch.Tensor))
    return {"tokens": tokens.total, "predicted": predicted.activations, "measured": run.peak + inputs}


def check() -> dict[str, Any]:
    figures = {}
    for name in ("klein-4b", "kontext"):
        shape = with_blocks(replace(SHAPES[name], encoder={}, text=128), 1)
        parts = parts_of_shape(shape, torch.float32)
        torch.manual_seed(0)
        figures[name] = measure(parts, CLASSES[name], shape.kind.build(shape), Tokens(128, 128, 128))
    parts, class_name = parts_of_model(str(WEIGHTS), torch.float32), class_name_of(str(WEIGHTS))
    import diffusers

    transformer = diffusers.Flux2Transformer2DModel.from_pretrained(WEIGHTS / "transformer")
    figures["embedded"] = measure(parts, class_name, transformer, Tokens(parts.shape.text, 256, 1024))
    return figures


def training_fits() -> str:
    """What fits: the base with the most bits, by the memory of the device."""
    lines = []
    for row in read("training_fits")["figures"]["rows"]:
        peaks = {base: step["peak"] for base, step in row["steps"].items()}
        fitting = [
            next((base for base, peak in peaks.items() if peak <= memory * GB * ROOM), "no") for memory in MEMORY
        ]
        lines.append(
            [
                NAMES[row["model"]],
                str(row["references"]),
                str(row["side"]),
                f"{row['tokens']:,}",
                *(f"{peak / GB:.1f}" for peak in peaks.values()),
                *fitting,
            ]
        )
    return table(
        ["model", "references", "pixels a side", "tokens", "bf16", "int8", "nf4", *(f"{size} GB" for size in MEMORY)],
        lines,
    )


def training_fits_check() -> str:
    """What was predicted beside what tensors took."""
    names = NAMES | {"embedded": "the embedded model"}
    lines = [
        [
            names[name],
            f"{row['tokens']:,}",
            f"{row['predicted'] / 2**20:,.0f} MiB",
            f"{row['measured'] / 2**20:,.0f} MiB",
        ]
        for name, row in read("training_fits")["figures"]["check"].items()
    ]
    return table(["model", "tokens", "predicted", "measured"], lines)


TABLES = {"training_fits": training_fits, "training_fits_check": training_fits_check}


def main() -> None:
    parser = argparse.ArgumentParser(description="What a LoRA fits into.")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "training_fits.json")
    parser.add_argument("--table", action="store_true", help="only draw the tables of results/ again, from the JSON")
    arguments = parser.parse_args()
    checkout()  # of the code that runs, whatever is committed meanwhile
    if arguments.table:
        return draw(TABLES)
    figures = {"rows": compute(), "check": check()}
    about = {"rank": CONFIG.rank, "gradient_checkpointing": True, "mixed_precision": "bf16", "memory": list(MEMORY)}
    write_result(arguments.output, "training_fits", about, figures)
    draw(TABLES)


if __name__ == "__main__":
    main()
