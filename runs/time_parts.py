"""What was weighed on the way to the published speed: hashes, pixels, ways to encode references, caches, and scenes.

Processor time on one thread, so that a busy machine changes little; the median of the runs after a warm-up. References
have 1024 x 1024 pixels, and those that are encoded 192 x 192, four of them. Training
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
import numpy as np
import torch
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from PIL import Image
from tables import draw, read, table
from time_selection import picture

from recipes.mini.base import BaseConfig, batch_scenes
from recipes.mini.data import Assets, load_assets
from sparse_context import ReferenceCache, SparseContextConfig, select_tokens
from sparse_context.cache import _digest
from sparse_context.families.pictures import to_uint8
from sparse_context.families.pixels import preprocess_lazily
from sparse_context.pipelines.load import load, speed_up_vae
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
    """Of each group of parts, the time as a share of that of its first."""
    times = read("parts")["figures"]["milliseconds"]
    firsts: dict[str, float] = {}
    rows = [[name, f"{value / firsts.setdefault(name.split(',')[0], value):.2f}"] for name, value in times.items()]
    return table(["part", "time, first of its kind = 1"], rows)


TABLES = {
    "parts": parts,
}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="Time the parts that were weighed against each other.")
    parser.add_argument("--assets", type=Path, default=ROOT / "checkpoints" / "assets.safetensors")
    parser.add_argument("--compile", action="store_true", help="also encode by torch.compile, which takes a minute")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "parts.json")
    parser.add_argument("--table", action="store_true", help="only draw the tables of results/ again, from the JSON")
    arguments = parser.parse_args()
    checkout()  # of the code that runs, whatever is committed meanwhile
    if arguments.table:
        return draw(TABLES)

    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    drawn = picture()[..., :3].copy()
    photo, processor = Image.fromarray(drawn), Flux2ImageProcessor(vae_scale_factor=16)
    lazily = preprocess_lazily(processor)
    large = processor.preprocess(photo)
    pipe = load(ModelSpec(device="cpu"))
    vae = pipe.vae
    last, compiled = (copy.deepcopy(vae) for _ in range(2))
    speed_up_vae(last, "channels-last")
    if arguments.compile:
        speed_up_vae(compiled, "compiled")
    # In the order in which the pipeline hands them over
    small = [processor.preprocess(photo.crop((192 * i, 0, 192 * i + 192, 192))) for i in range(4)]
    whole = torch.cat(small)
    scores, cache = np.random.default_rng(0).random((64, 64), np.float32), ReferenceCache()
    remembered = vae.encode(small[0]).latent_dist.mode()

    def hit() -> None:
        """What a reference that was seen before takes: its pixels, their name, its latents and its scores."""
        lazy = lazily(photo)
        cache.encode(lazy.shown, small[0], vae, lambda: remembered)
        cache._find(_digest(("subject", (64, 64), (0, 0)), b"", lazy.shown[0]), np.ndarray)

    hit()
    cache._hold(_digest(("subject", (64, 64), (0, 0)), b"", lazily(photo).shown[0]), scores)
    jobs = {
        "pixels, as diffusers": lambda: processor.preprocess(photo),
        "pixels, bytes": lambda: lazily(photo),
        "pixels, bytes and then floats": lambda: lazily(photo).floats,
        "hash, sha256 of bytes": lambda: hashlib.sha256(drawn.data).digest(),
        "cache, a hit": hit,
        **{
            f"hash, {name} of floats": lambda name=name: hashlib.new(name, large.contiguous().numpy().data).digest()
            for name in ("sha256", "blake2b")
        },
        "8 bits, out of place": lambda: out_of_place(large),
        "8 bits, in place": lambda: in_place(large),
        "8 bits, by OpenCV": lambda: to_uint8(large),
        "encode, one by one": lambda: [vae.encode(each) for each in small],
        "encode, as a batch": lambda: vae.encode(whole),
        "encode, channels-last": lambda: [last.encode(each) for each in small],
        **({"encode, compiled": lambda: [compiled.encode(each) for each in small]} if arguments.compile else {}),
        "choose, four of 192 x 192": lambda: select_tokens(
            [to_uint8(each)[0] for each in small], [(24, 24)] * 4, SparseContextConfig(keep=0.15)
        ),
        "choose, 1024 x 1024": lambda: select_tokens(
            [drawn], [(64, 64)], SparseContextConfig(keep=0.1, task="subject")
        ),
    }
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    for run in range(WARM_UP + RUNS):
        for name, job in jobs.items():
            start = time.process_time()
            job()
            if run >= WARM_UP:
                taken[name].append(1000 * (time.process_time() - start))
    each = torch.cat([vae.encode(picture).latent_dist.mode() for picture in small])
    ways = {"as a batch": vae.encode(whole), "channels-last": last.encode(whole)}
    if arguments.compile:
        ways["compiled"] = compiled.encode(small[0])
    figures = {
        "milliseconds": {name: round(median(values), 2) for name, values in taken.items()},
        "largest_difference": {
            name: float((made.latent_dist.mode() - each[: len(made.latent_dist.mode())]).abs().max())
            for name, made in ways.items()
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
