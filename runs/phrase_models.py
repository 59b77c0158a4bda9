"""What the models that find phrases cost: parameters, and FLOPs beside those of a sparse call of klein-9B.

The classes of transformers are built at their published sizes with random weights, and look at one reference, which
each model scales to its own size. What they compute is counted, not timed.

    python runs/phrase_models.py
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from tables import RESULTS, draw, read, table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Sam3Config,
    Sam3Model,
)

from sparse_context.bench.flops import call_flops
from sparse_context.bench.shapes import SHAPES
from sparse_context.families.shape import Tokens
from sparse_context.result import write_result

WORDS = 5  # tokens of a phrase, with its begin and end
KEEP, STEPS, GRID = 0.2, 4, 64 * 64


def clipseg() -> tuple[Any, int]:
    """`CIDAS/clipseg-rd64-refined`: patches of 16 pixels, and the decoder with three convolutions."""
    config = CLIPSegConfig(vision_config={"patch_size": 16}, use_complex_transposed_convolution=True)
    return CLIPSegForImageSegmentation(config), 352


def owlv2() -> tuple[Any, int]:
    """`google/owlv2-base-patch16-ensemble`."""
    return Owlv2ForObjectDetection(Owlv2Config(vision_config={"image_size": 960})), 960


def grounding_dino() -> tuple[Any, int]:
    """`IDEA-Research/grounding-dino-tiny`."""
    return GroundingDinoForObjectDetection(GroundingDinoConfig()), 800


def sam3() -> tuple[Any, int]:
    """`facebook/sam3`, without its tracker."""
    return Sam3Model(Sam3Config()), 1008


MODELS: dict[str, Callable[[], tuple[Any, int]]] = {
    "CLIPSeg": clipseg,
    "OWLv2": owlv2,
    "Grounding DINO": grounding_dino,
    "SAM 3": sam3,
}


def count(build: Callable[[], tuple[Any, int]]) -> dict[str, Any]:
    """Parameters of a model, its input in pixels a side, and FLOPs of one picture and phrase."""
    model, side = build()
    inputs = {"pixel_values": torch.zeros(1, 3, side, side), "input_ids": torch.ones(1, WORDS, dtype=torch.long)}
    # The counter knows no fused attention of CPUs
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.eval()(**inputs)
    parameters = sum(each.numel() for each in model.parameters())
    return {"parameters": parameters, "side": side, "flops": counter.get_total_flops()}


def phrase_models() -> str:
    """Parameters and FLOPs of each model, and these as a share of a sparse call's."""
    figures = read("phrase_models")["figures"]
    rows = []
    for name, each in figures["models"].items():
        share = 100 * each["flops"] / figures["call"]
        rows.append(
            [
                name,
                f"{each['parameters'] / 1e6:.0f} M",
                f"{each['side']}",
                f"{each['flops'] / 1e12:.2g}",
                f"{share:.2g} %",
            ]
        )
    return table(["model", "parameters", "pixels a side", "TFLOP", "of a sparse call"], rows)


TABLES = {"phrase_models": phrase_models}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="Draw the table again, and count nothing.")
    if not parser.parse_args().table:
        shape = SHAPES["klein-9b"]
        call = call_flops(shape, Tokens(shape.text, GRID, round(KEEP * GRID)), STEPS)
        models = {name: count(build) for name, build in MODELS.items()}
        settings = {"words": WORDS, "keep": KEEP, "steps": STEPS, "output": GRID, "references": 1}
        write_result(RESULTS / "phrase_models.json", "phrase models", settings, {"models": models, "call": call})
    draw(TABLES)


if __name__ == "__main__":
    main()
