"""Steps of LoRA fine-tuning at the true shape of klein-4B with random weights: time against all tokens, and memory.

    python runs/time_klein_training.py [--shape klein-4b] [--size 512] [--references 1] [--keep 0.2] [--blocks N]

A step is what `sparse-context train` does for a batch of one whose latents and text are cached: choose the tokens,
forward, backward with gradient checkpointing, clip, AdamW, on a LoRA of rank 64 in bfloat16. Latents and text are drawn
at random, so neither text encoder nor VAE takes part. Steps with all tokens and with few run in turns; the first turn
is the warm-up, and there the peak of memory is read, in bytes above what is held between steps: the weights, the LoRA
and the optimiser's state. `--blocks` takes so many of each kind of block in the place of all, for machines that cannot
hold the whole or wait for it. Seconds are written where the device is a GPU, elsewhere ratios.
"""

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median

import torch
from tables import draw, read, speedup, table
from tqdm import tqdm

from sparse_context.bench.build import build_pipeline
from sparse_context.bench.figures import Spread
from sparse_context.bench.shapes import SHAPES
from sparse_context.families import find_host
from sparse_context.families.shape import Tokens, with_blocks
from sparse_context.pipelines.load import find_device
from sparse_context.pipelines.memory import Peak
from sparse_context.pipelines.settings import call_settings
from sparse_context.pipelines.timing import now
from sparse_context.result import checkout, write_result
from sparse_context.training.batch import Encoded
from sparse_context.training.config import TrainConfig
from sparse_context.training.dropping import Dropping, draw_selection
from sparse_context.training.loss import flow_matching_loss
from sparse_context.training.trainable import prepare

ROOT = Path(__file__).resolve().parents[1]


def klein_training() -> str:
    """Time and memory of a step of fine-tuning at a part of klein-4B's shape, with all tokens and with a fifth."""
    figures = read("klein_training")["figures"]
    faster = {"dense": "1.00x", "sparse": speedup(Spread(**figures["speedup"]))}
    rows = [
        [
            f"{figures['tokens'][name]['references']:,}",
            faster[name],
            f"{figures['memory_above_weights'][name] / 2**30:.2f} GiB",
        ]
        for name in faster
    ]
    return table(["reference tokens", "speed-up of a step", "memory beside the weights"], rows)


TABLES = {
    "klein_training": klein_training,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tuning steps at the shape of a real model.")
    parser.add_argument("--shape", choices=[name for name in SHAPES if name.startswith("klein")], default="klein-4b")
    parser.add_argument("--size", type=int, default=512, help="pixels a side, of the output and of each reference")
    parser.add_argument("--references", type=int, default=1)
    parser.add_argument("--keep", type=float, default=0.2)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--blocks", type=int, help="of each kind, in place of all")
    parser.add_argument("--device")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "klein_training.json")
    parser.add_argument("--table", action="store_true", help="only draw the tables of results/ again, from the JSON")
    arguments = parser.parse_args()
    checkout()  # of the code that runs, whatever is committed meanwhile
    if arguments.table:
        return draw(TABLES)

    whole = replace(SHAPES[arguments.shape], encoder={})
    shape = whole if arguments.blocks is None else with_blocks(whole, arguments.blocks)
    device, side = find_device(arguments.device), arguments.size // whole.token
    pipe = build_pipeline(shape, device, torch.bfloat16)
    host = find_host(pipe, call_settings(pipe))
    config = TrainConfig(rank=64, lora_alpha=64, gradient_checkpointing=True)
    trained = prepare(host, config)
    optimiser = torch.optim.AdamW(trained.parameters(), lr=config.learning_rate)
    torch.manual_seed(0)

    def latents() -> torch.Tensor:
        return torch.randn(1, shape.channels, side, side, device=device)

    text = {"prompt_embeds": torch.randn(1, shape.text, shape.text_width, device=device)}
    places = torch.zeros(1, side * side, device=device)
    encoded = Encoded(latents(), [latents() for _ in range(arguments.references)], text, places, places - 1)
    noise, sigma = latents(), torch.full((1,), 0.5, device=device)
    tokens: dict[str, Tokens] = {}

    def step(name: str, keep: float, number: int) -> float:
        """One step, in seconds."""
        dropping = Dropping(keep_min=keep, keep_max=keep, dense=float(keep == 1), mix={"random": 1.0})
        start = now(device)
        selection = draw_selection(
            dropping, [None] * arguments.references, [(side, side)] * arguments.references, [0, number]
        )
        with torch.autocast(device.type, torch.bfloat16):
            loss = flow_matching_loss(host, encoded, selection.index, sigma, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), config.max_grad_norm)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        tokens[name] = Tokens(shape.text, side * side, selection.kept)
        return now(device) - start

    step("sparse", arguments.keep, 0)  # makes the optimiser's state, which the peak of no step is to count
    kinds = {"dense": 1.0, "sparse": arguments.keep}
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    memory: dict[str, int | None] = {}
    with tqdm(total=(1 + arguments.turns) * len(kinds), unit="step") as bar:
        for turn in range(1 + arguments.turns):
            for name, keep in kinds.items():
                peak = Peak(device) if turn == 0 else None
                took = step(name, keep, turn)
                if peak is not None:
                    memory[name] = peak.read()
                else:
                    seconds[name].append(took)
                bar.update()
    ratios = sorted(dense / sparse for dense, sparse in zip(*seconds.values(), strict=True))
    faster = {"median": round(median(ratios), 3), "min": round(ratios[0], 3), "max": round(ratios[-1], 3)}
    weights = sum(p.numel() * p.element_size() for p in host.transformer.parameters())
    figures = {
        "speedup": faster,
        "memory_above_weights": memory,
        "weights": weights,
        "tokens": {name: asdict(each) for name, each in tokens.items()},
        "blocks": [shape.double_blocks, shape.single_blocks],
        "of": [whole.double_blocks, whole.single_blocks],
    }
    if device.type == "cuda":
        figures["seconds"] = {name: round(median(each), 3) for name, each in seconds.items()}
    print(
        f"{faster['median']:.2f}x ({faster['min']:.2f} to {faster['max']:.2f}); weights {weights / 2**30:.1f} GiB; "
        f"above them { ({n: f'{m / 2**30:.2f} GiB' for n, m in memory.items() if m is not None}) }"
    )
    if arguments.blocks is not None:
        print(
            f"Measured with {shape.double_blocks} double and {shape.single_blocks} single blocks of "
            f"{whole.double_blocks} and {whole.single_blocks}."
        )
    about = {
        "shape": arguments.shape,
        "size": arguments.size,
        "references": arguments.references,
        "keep": arguments.keep,
        "rank": config.rank,
        "turns": arguments.turns,
        "dtype": "bfloat16",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
    }
    write_result(arguments.output, "klein_training", about, figures)
    draw(TABLES)


if __name__ == "__main__":
    main()
