"""Dense against sparse sampling in a real ComfyUI core: a model with random weights, small but with long sequences.

All run in one process in turns; each figure is the median over the turns, and a ratio is the median of the ratios
within a turn. What is measured is the core's sampler, with all that it does around the model; beside it stands what the
report of the nodes calculates. The order changes from turn to turn.

    COMFYUI_DIR=/path/to/ComfyUI python runs/comfyui_speed.py [--keep 0.2] [--output results/comfyui_speed.json]
"""

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import comfyui_core as core
from tables import draw, machine, read, speedup, table

from sparse_context.bench.figures import Spread
from sparse_context.result import checkout, write_result

ROOT = Path(__file__).resolve().parents[1]
TURNS = 5
STEPS = 2
WIDTH, HEADS, BLOCKS, SIDE = 256, 4, 2, 32  # of the model, each kind of block twice; and tokens a side
CASES = [(1, False), (2, False), (4, False), (4, True)]


def comfyui_speed() -> str:
    """Sparse against dense, measured and calculated."""
    rows = []
    for row in read("comfyui_speed")["figures"]["cases"]:
        rows.append(
            [
                str(row["references"]),
                "yes" if row["kv"] else "no",
                f"{row['kept']} of {row['total']}",
                speedup(Spread(**row["speedup"])),
                f"{row['calculated']:.2f}x",
            ]
        )
    drawn = table(["references", "FluxKVCache", "tokens kept", "sampling", "as the report calculates"], rows)
    return f"{drawn}\n\n{machine(read('comfyui_speed'))}"


TABLES = {
    "comfyui_speed": comfyui_speed,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Dense against sparse in a real ComfyUI core.")
    parser.add_argument("--keep", type=float, default=0.2)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "comfyui_speed.json")
    parser.add_argument("--table", action="store_true", help="only draw the tables of results/ again, from the JSON")
    arguments = parser.parse_args()
    checkout()  # of the code that runs, whatever is committed meanwhile
    if arguments.table:
        return draw(TABLES)
    version = core.start_core("--use-pytorch-cross-attention")
    cases = [measure(count, kv, arguments.keep) for count, kv in CASES]
    config = {"keep": arguments.keep, "turns": TURNS, "steps": STEPS, "width": WIDTH, "heads": HEADS, "blocks": BLOCKS}
    config |= {"core": version, "output": [SIDE, SIDE], "text": 512}
    write_result(arguments.output, "comfyui_speed", config, {"cases": cases})
    draw(TABLES)


def measure(count: int, kv: bool, keep: float) -> dict[str, Any]:
    """The figures for so many references."""
    import comfy_extras.nodes_flux as nodes_flux
    from comfy.patcher_extension import WrappersMP

    core.load_pack()
    from sparse_context_nodes.choosing import References, Settings, choose
    from sparse_context_nodes.families import FAMILIES
    from sparse_context_nodes.patch import SparsePatch, install

    settings = Settings(keep=keep)
    dense = core.build("flux2", WIDTH, HEADS, BLOCKS)
    patch = SparsePatch(
        lambda grids, details, kv: choose(settings, References(), grids, details),
        FAMILIES["flux2"],
        patch=1,
        needs_details=True,
    )
    sparse = install(dense, patch, WrappersMP.OUTER_SAMPLE, WrappersMP.DIFFUSION_MODEL)
    models = {"dense": dense, "sparse": sparse}
    if kv:
        models = {name: nodes_flux.FluxKVCache.execute(model).args[0] for name, model in models.items()}
    references = [core.draw_latents("flux2", SIDE, SIDE, seed=i) for i in range(count)]
    prompt, latent = core.draw_prompt(references), core.draw_latents("flux2", SIDE, SIDE)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(TURNS + 1):
        for name in sorted(models, reverse=turn % 2 == 1):
            start = time.perf_counter()
            core.sample(models[name], latent, prompt, steps=STEPS)
            if turn:  # the first one warms up
                seconds[name].append(time.perf_counter() - start)
    ratios = [whole / kept for whole, kept in zip(seconds["dense"], seconds["sparse"], strict=True)]
    (selection,) = patch.last.selections
    return {
        "references": count,
        "kv": kv,
        "kept": selection.kept,
        "total": selection.total,
        "speedup": {"median": median(ratios), "min": min(ratios), "max": max(ratios)},
        "calculated": patch.last.speedup,
    }


if __name__ == "__main__":
    main()
