"""Whether a reference may be encoded in parts, and those without a kept token left out: what it does to latents.

    python runs/tiled_encoding.py [--output results/tiled_encoding.json]

A picture is encoded whole, and a square of it with a border around: the latents inside the square are compared, by the
root mean square of their difference over that of the whole ones'. For the embedded model's VAE, which has no attention;
and for an encoder in the shape of FLUX.2's with random weights, with the attention of its middle block and without. The
rest of a difference is the group norms', whose statistics are those of all that is encoded at once.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from tables import draw, read, table
from torch import nn

from sparse_context.bench.build import draw_weights
from sparse_context.embedded.demo import read_examples
from sparse_context.pipelines.load import load
from sparse_context.pipelines.spec import ModelSpec
from sparse_context.preview import fit_reference
from sparse_context.result import checkout, write_result

ROOT = Path(__file__).resolve().parents[1]
BORDERS = (0, 1, 2, 4)  # tokens around the square


def latents(vae, pixels: torch.Tensor) -> torch.Tensor:
    return vae.encode(pixels).latent_dist.mode()


def differences(vae, pictures: list[torch.Tensor], token: int) -> dict[str, float]:
    """By the border, the mean over pictures of the square in the middle, half a picture wide."""
    found: dict[str, list[float]] = {str(border): [] for border in BORDERS}
    factor = token // 2  # pixels of a latent
    for pixels in pictures:
        whole = latents(vae, pixels)
        side = pixels.shape[-1] // token // 4 * token
        start, stop = side, 3 * side
        inside = whole[..., start // factor : stop // factor, start // factor : stop // factor]
        for border in BORDERS:
            first, last = start - border * token, stop + border * token
            part = latents(vae, pixels[..., first:last, first:last])
            edge = border * token // factor
            part = part[..., edge : part.shape[-2] - edge, edge : part.shape[-1] - edge]
            found[str(border)].append(float((part - inside).pow(2).mean().sqrt() / inside.pow(2).mean().sqrt()))
    return {border: round(float(np.mean(values)), 4) for border, values in found.items()}


def without_attention(vae) -> nn.Module:
    vae.encoder.mid_block.attentions = nn.ModuleList([None] * len(vae.encoder.mid_block.attentions))
    return vae


def without_statistics(vae) -> nn.Module:
    """Its group norms only scale and shift."""
    for module in vae.modules():
        if isinstance(module, nn.GroupNorm):
            module.forward = lambda x, norm=module: x * norm.weight[:, None, None] + norm.bias[:, None, None]
    return vae


def tiled_encoding() -> str:
    """The difference of the latents by the border, in per cent."""
    figures = read("tiled_encoding")["figures"]
    rows = [[name, *(f"{100 * each[str(border)]:.1f}" for border in BORDERS)] for name, each in figures.items()]
    return table(["encoder", *(f"border {border}" for border in BORDERS)], rows)


TABLES = {"tiled_encoding": tiled_encoding}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="What encoding in parts does to latents.")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "tiled_encoding.json")
    parser.add_argument("--table", action="store_true", help="only draw the tables of results/ again, from the JSON")
    arguments = parser.parse_args()
    checkout()  # of the code that runs, whatever is committed meanwhile
    if arguments.table:
        return draw(TABLES)

    from diffusers import AutoencoderKLFlux2

    pipe = load(ModelSpec(device="cpu"))
    scenes = [each["references"][0] for each in read_examples()]

    def pictures(side: int, count: int) -> list[torch.Tensor]:
        fitted = [fit_reference(each.convert("RGB"), side).resize((side, side)) for each in scenes[:count]]
        return [pipe.image_processor.preprocess(each) for each in fitted]

    def flux2():
        with torch.device("meta"):
            vae = AutoencoderKLFlux2()
        return draw_weights(vae, torch.device("cpu"), torch.float32).eval()

    seen, large = pictures(192, 8), pictures(256, 2)
    figures = {
        "embedded": differences(pipe.vae, seen, 8),
        "embedded, norms without statistics": differences(without_statistics(pipe.vae), seen, 8),
        "FLUX.2's, random weights": differences(flux2(), large, 16),
        "FLUX.2's, without attention": differences(without_attention(flux2()), large, 16),
        "FLUX.2's, without both": differences(without_statistics(without_attention(flux2())), large, 16),
    }
    write_result(arguments.output, "tiled_encoding", {"borders": BORDERS, "sides": [192, 256]}, figures)
    draw(TABLES)
    for name, each in figures.items():
        print(f"{name:40}", each)


if __name__ == "__main__":
    main()
