"""What was weighed on the way to the published speed: hashes, 8-bit pixels, ways to encode references, and scenes.

Processor time on one thread, so that a busy machine changes little; the median of the runs after a warm-up. Training
scenes differ, so theirs is the mean over the batches of the base's recipe once all tasks are drawn; without the assets
of the working folder it is left out.

    python runs/time_parts.py [--assets checkpoints/assets.safetensors] [--output results/parts.json]
"""

import argparse
import copy
import hashlib
import time
from pathlib import Path
from statistics import median

import cv2
import torch
from tables import draw, read, table

from recipes.mini.base import BaseConfig, batch_scenes
from recipes.mini.data import Assets, load_assets
from sparse_context.families.pictures import to_uint8
from sparse_context.pipelines.load import load
from sparse_context.pipelines.spec import ModelSpec
from sparse_context.result import checkout, write_result

ROOT = Path(__file__).resolve().parents[1]
WARM_UP, RUNS = 2, 9
BATCHES = 100  # of training scenes; each has its own task and sizes


def out_of_place(pixels: torch.Tensor):
    """`to_uint8` by torch, with a new tensor for every operation."""
    return ((pixels.permute(0, 2, 3, 1).float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu().numpy()


def in_place(pixels: torch.Tensor):
    """`to_uint8` by torch, in the first of these tensors."""
    grey = pixels.float().add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)
    return grey.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def milliseconds_a_scene(assets: Assets) -> float:
    """The mean over `BATCHES` batches with the mix that the base's training ends with, after a warm-up."""
    config = BaseConfig().without_easy_part
    for step in range(WARM_UP):
        batch_scenes(assets, config, step)
    start = time.process_time()
    scenes = sum(len(batch_scenes(assets, config, WARM_UP + step)) for step in range(BATCHES))
    return 1000 * (time.process_time() - start) / scenes


def parts() -> str:
    times = read("parts")["figures"]["milliseconds"]
    return table(["part", "milliseconds"], ([name, f"{value:.1f}"] for name, value in times.items()))


TABLES = {
    "parts": parts,
}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="Time the parts that were weighed against each other.")
    parser.add_argument("--assets", type=Path, default=ROOT / "checkpoints" / "assets.safetensors")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "parts.json")
    parser.add_argument("--table", action="store_true", help="only draw the tables of results/ again, from the JSON")
    arguments = parser.parse_args()
    checkout()  # of the code that runs, whatever is committed meanwhile
    if arguments.table:
        return draw(TABLES)

    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    large = torch.rand(1, 3, 1024, 1024, generator=torch.Generator().manual_seed(0)) * 2 - 1
    vae = load(ModelSpec(device="cpu")).vae
    last = copy.deepcopy(vae).to(memory_format=torch.channels_last)
    small = [large[..., i * 128 : (i + 1) * 128, :128].contiguous() for i in range(4)]
    whole = torch.cat(small)
    jobs = {
        **{
            f"hash, {name}": lambda name=name: hashlib.new(name, large.numpy().data).digest()
            for name in ("sha256", "sha1", "blake2b", "blake2s", "md5")
        },
        "8 bits, out of place": lambda: out_of_place(large),
        "8 bits, in place": lambda: in_place(large),
        "8 bits, by OpenCV": lambda: to_uint8(large),
        "encode, one by one": lambda: [vae.encode(each) for each in small],
        "encode, as a batch": lambda: vae.encode(whole),
        "encode, channels last": lambda: [last.encode(each) for each in small],
    }
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    for run in range(WARM_UP + RUNS):
        for name, job in jobs.items():
            start = time.process_time()
            job()
            if run >= WARM_UP:
                taken[name].append(1000 * (time.process_time() - start))
    each = torch.cat([vae.encode(picture).latent_dist.mode() for picture in small])
    other = torch.cat([last.encode(picture).latent_dist.mode() for picture in small])
    figures = {
        "milliseconds": {name: round(median(values), 2) for name, values in taken.items()},
        "largest_difference": {
            "as a batch": float((vae.encode(whole).latent_dist.mode() - each).abs().max()),
            "channels last": float((other - each).abs().max()),
        },
    }
    if arguments.assets.is_file():
        composed = milliseconds_a_scene(load_assets(arguments.assets).split("train"))
        figures["milliseconds"]["compose a training scene"] = round(composed, 2)
        figures["scenes a second"] = round(1000 / composed, 1)
    else:
        print(f"{arguments.assets} is missing, so composing scenes is left out: `python -m recipes.mini data`.")
    about = {"runs": RUNS, "warm_up": WARM_UP, "batches of scenes": BATCHES, "threads": 1}
    write_result(arguments.output, "parts", about, figures)
    draw(TABLES)
    for name, milliseconds in figures["milliseconds"].items():
        print(f"{name:24}{milliseconds:8.2f} ms")


if __name__ == "__main__":
    main()
