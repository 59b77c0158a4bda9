"""What a LoRA fits into, at the shapes of real models: computed, and checked on a CPU with few blocks of true width.

    python runs/fits.py

A step is one of `sparse-context train` with `gradient_checkpointing=true`, latents and texts cached (so that no encoder
is loaded), a LoRA of rank 16 in bf16 mixed precision, a batch of one with all tokens. Its memory is computed from
shapes (training/predict.py). To check that, steps are made on a CPU in float32 with one block of each kind and random
weights, and of the whole embedded model, and it is measured by how much the process grows in one. The C library is told
to give freed memory back at once, for what it would keep is not the step's.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import Flux2Transformer2DModel
from tables import draw, read, table

from sparse_context.bench.shapes import SHAPES
from sparse_context.families.shape import Tokens, with_blocks
from sparse_context.pipelines.embedded import WEIGHTS
from sparse_context.pipelines.hub import class_name_of
from sparse_context.pipelines.memory import Peak
from sparse_context.pipelines.predict import ROOM, Parts, parts_of_model, parts_of_shape
from sparse_context.result import checkout, write_result
from sparse_context.training.config import TrainConfig
from sparse_context.training.memory import return_freed_memory
from sparse_context.training.predict import Plan, StepPredictor, host_of
from sparse_context.training.trainable import prepare, run_optimisers

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


def alone(parts: Parts) -> Parts:
    """The transformer without its encoders."""
    return replace(
        parts,
        modules={"transformer": parts.modules["transformer"]},
        weights={"transformer": parts.weights["transformer"]},
    )


def compute() -> list[dict[str, Any]]:
    predictors = {
        (name, base): StepPredictor(
            alone(parts_of_shape(replace(SHAPES[name], encoder={}), torch.bfloat16)),
            CLASSES[name],
            CONFIG,
            Plan(base, mixed=torch.bfloat16),
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


def measure(parts: Parts, class_name: str, transformer: Any, tokens: Tokens, checkpointing: bool) -> dict[str, Any]:
    """What a step takes beside weights, LoRA and AdamW's moments: predicted, and by how much the process grew.

    The first step is not measured: it makes the moments, and buffers that math libraries keep.
    """
    config, cpu = replace(CONFIG, gradient_checkpointing=checkpointing), torch.device("cpu")
    predicted = StepPredictor(parts, class_name, config, Plan(device="cpu"))(
        [(1, tokens.references)], 1.0, (1, tokens.output)
    )
    trained = prepare(host_of(class_name, transformer), config)
    optimisers = run_optimisers(transformer, trained, config)
    taken: int | None = None
    for _ in range(2):
        peak = Peak(cpu)
        given = parts.shape.kind.arguments(transformer, parts.shape, tokens, None)
        loss = transformer(**given, return_dict=False)[0].float().square().mean()
        loss.backward()
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        del given, loss
        taken = peak.read()
    return {
        "tokens": tokens.total,
        "gradient_checkpointing": checkpointing,
        "predicted": predicted.activations,
        "measured": taken,
    }


def check() -> list[dict[str, Any]]:
    """Predicted and measured, for the three models with and without gradient checkpointing."""
    return_freed_memory()
    rows = []
    for checkpointing in (False, True):
        for name in ("klein-4b", "kontext"):
            shape = with_blocks(replace(SHAPES[name], encoder={}, text=128), 1)
            parts = alone(parts_of_shape(shape, torch.float32))
            torch.manual_seed(0)
            transformer, tokens = shape.kind.build(shape), Tokens(128, 128, 256)
            rows.append({"model": name, **measure(parts, CLASSES[name], transformer, tokens, checkpointing)})
            del transformer
        parts = alone(parts_of_model(str(WEIGHTS), torch.float32))
        transformer = Flux2Transformer2DModel.from_pretrained(WEIGHTS / "transformer")
        tokens, class_name = Tokens(parts.shape.text, 256, 1024), class_name_of(str(WEIGHTS))
        rows.append({"model": "embedded", **measure(parts, class_name, transformer, tokens, checkpointing)})
    return rows


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
    """What was predicted beside by how much the process grew."""
    names = NAMES | {"embedded": "the embedded model"}
    lines = [
        [
            names[row["model"]],
            f"{row['tokens']:,}",
            "yes" if row["gradient_checkpointing"] else "no",
            f"{row['predicted'] / 10**6:,.0f} MB",
            f"{row['measured'] / 10**6:,.0f} MB",
            f"{row['predicted'] / row['measured'] - 1:+.1%}",
        ]
        for row in read("training_fits")["figures"]["check"]
    ]
    return table(["model", "tokens", "gradient checkpointing", "computed", "measured", "difference"], lines)


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
