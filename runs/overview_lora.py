"""What a LoRA of klein-4B for overviews takes: operations, time and memory, computed and not measured.

    python runs/overview_lora.py

A batch is one of runs/train_klein.sh with `--overview-factors 2,4`: a sample of 512 pixels a side, a forward of the
teacher with all tokens, and three sets of tokens, each forward and backward with gradient checkpointing and a LoRA of
rank 64. Its operations are counted by torch on a model without weights. From them follows the least time on a GPU that
computes as fast as the H200 of results/bench_gpu_klein-4b.json did in calls. The memory is that of all weights and the
optimiser, by their sizes, and what results/klein_training.json measured beside them with a few blocks, with the inputs
of the other blocks added, which is what gradient checkpointing keeps.
"""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tables import draw, read, read_bench, table
from torch.utils.flop_counter import FlopCounterMode

from sparse_context.bench.flops import call_flops
from sparse_context.bench.shapes import SHAPES
from sparse_context.families.shape import Tokens
from sparse_context.result import checkout, write_result
from sparse_context.training.config import TrainConfig
from sparse_context.training.dropping import Dropping, draw_selection

ROOT = Path(__file__).resolve().parents[1]
SHAPE = SHAPES["klein-4b"]
SIDE = 512 // SHAPE.token  # tokens
CONFIG = TrainConfig(
    rank=64,
    lora_alpha=64,
    subsets=3,
    distillation=1.0,
    gradient_accumulation_steps=4,
    gradient_checkpointing=True,
    ema=0.99,
    max_train_steps=10_000,
    dropping=Dropping(keep_max=0.6, dense=0.06, mix={"random": 1.0}, overview_factors=(2, 4), overview_residual=0.0),
)
"""That of runs/train_klein.sh as far as it decides what is computed."""
DRAWS = 500


def overview_lora() -> str:
    """What a batch and a run take, by the number of references."""
    rows = []
    for row in read("overview_lora")["figures"]["rows"]:
        memory = row["memory"]
        rows.append(
            [
                str(row["references"]),
                f"{row['kept']:,} of {row['total']:,}",
                f"{row['flops'] / 1e12:,.0f}",
                f"{row['seconds']:.2f} s",
                f"{row['hours']:.0f}",
                "" if memory is None else f"{memory / 2**30:.1f} GiB",
            ]
        )
    return table(["references", "tokens kept", "TFLOPs a batch", "batch", "hours a run", "memory"], rows)


TABLES = {"overview_lora": overview_lora}


def empty_transformer() -> tuple[Any, int]:
    """The transformer on the meta device, with its LoRA, and how many numbers that has."""
    from peft import LoraConfig

    with torch.device("meta"):
        transformer = SHAPE.kind.build(SHAPE)
        torch.nn.Module.to(transformer, torch.bfloat16).requires_grad_(False)
        singles = range(SHAPE.single_blocks)
        # Those of families/flux2/train.py, whose host needs a whole pipeline
        targets = ["to_k", "to_q", "to_v", "to_out.0", "to_qkv_mlp_proj"]
        targets += [f"single_transformer_blocks.{i}.attn.to_out" for i in singles]
        transformer.add_adapter(LoraConfig(r=CONFIG.rank, lora_alpha=CONFIG.lora_alpha, target_modules=targets))
    transformer.enable_gradient_checkpointing()
    return transformer.train(), sum(p.numel() for p in transformer.parameters() if p.requires_grad)


def counted(transformer: Any, references: int, backward: bool) -> int:
    """The operations of one forward with so many reference tokens, and of its backward."""
    image = SIDE**2 + references
    arguments = {
        "hidden_states": torch.empty(1, image, SHAPE.channels, device="meta", dtype=torch.bfloat16),
        "encoder_hidden_states": torch.empty(1, SHAPE.text, SHAPE.text_width, device="meta", dtype=torch.bfloat16),
        "img_ids": torch.zeros(image, 4, device="meta"),
        "txt_ids": torch.zeros(SHAPE.text, 4, device="meta"),
        "timestep": torch.ones(1, device="meta", dtype=torch.bfloat16),
        "return_dict": False,
    }
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        velocity = transformer(**arguments)[0]
        if backward:
            velocity.float().sum().backward()
    return counter.get_total_flops()


def drawn_counts(references: int) -> np.ndarray:
    """How many reference tokens sets keep, overviews included."""
    picture = np.zeros((SIDE, SIDE, 3), np.uint8)
    grids = [(SIDE, SIDE)] * references
    return np.array([draw_selection(CONFIG.dropping, [picture] * references, grids, [0, i]).kept for i in range(DRAWS)])


def rate() -> float:
    """Operations a second that the GPU of the benchmark reached in calls with four references."""
    bench = read_bench("bench_gpu_klein-4b")
    row = next(row for row in bench.rows if row.method == "dense" and row.references == 4)
    return call_flops(SHAPE, Tokens(**asdict(row.tokens)), bench.steps) / row.seconds["denoise"].median


def held(lora: int) -> dict[str, int]:
    """Bytes that are there in every step: the weights, and what the optimiser and the average have of the LoRA."""
    from diffusers import AutoencoderKLFlux2
    from transformers import Qwen3Config, Qwen3ForCausalLM

    with torch.device("meta"):
        parts = {
            "transformer": SHAPE.kind.build(SHAPE),
            "text_encoder": Qwen3ForCausalLM(Qwen3Config(**SHAPE.encoder)),
            "vae": AutoencoderKLFlux2(),
        }
    weights = {name: 2 * sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    return weights | {"lora": (4 + 4 + 8 + 4) * lora}  # float32: itself, its gradient, AdamW's two means, the average


def activations() -> int:
    """Bytes beside what is held, with all tokens of four references."""
    measured = read("klein_training")["figures"]
    each = 2 * SHAPE.width * Tokens(**measured["tokens"]["dense"]).total
    return measured["memory_above_weights"]["dense"] + each * (sum(measured["of"]) - sum(measured["blocks"]))


def main() -> None:
    parser = argparse.ArgumentParser(description="What a LoRA of klein-4B for overviews takes.")
    parser.add_argument("--table", action="store_true", help="only draw the table of results/ again, from the JSON")
    arguments = parser.parse_args()
    checkout()
    if arguments.table:
        return draw(TABLES)
    transformer, lora = empty_transformer()
    sampled = np.array([0, SIDE**2, 4 * SIDE**2])
    of_a_set = np.polyfit(sampled, [counted(transformer, int(n), backward=True) for n in sampled], 2)
    parts, fast, rows = held(lora), rate(), []
    for references in (1, 4):
        total, kept = references * SIDE**2, drawn_counts(references)
        flops = counted(transformer, total, backward=False) + CONFIG.subsets * float(np.polyval(of_a_set, kept).mean())
        batches = CONFIG.max_train_steps * CONFIG.gradient_accumulation_steps
        rows.append(
            {
                "references": references,
                "kept": round(float(kept.mean())),
                "total": total,
                "flops": round(flops),
                "seconds": flops / fast,
                "hours": batches * flops / fast / 3600,
                "memory": sum(parts.values()) + activations() if references == 4 else None,
            }
        )
    about = {"shape": "klein-4b", "size": 512, "draws": DRAWS, "training": asdict(CONFIG)}
    figures = {"rows": rows, "held": parts, "lora": lora, "rate": fast}
    write_result(ROOT / "results" / "overview_lora.json", "overview_lora", about, figures)
    draw(TABLES)


if __name__ == "__main__":
    main()
