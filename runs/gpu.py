"""Everything that is to be known of a CUDA GPU, part by part in the order of worth, with random weights.

    python runs/gpu.py --minutes 6              # then again with --minutes 3: goes on where it stopped
    python runs/gpu.py --tiny --device cpu      # a rehearsal: tiny shapes, and nothing that is written means anything

Each part is written into a folder of its own as soon as it is done, and one that is there is not run again. A part is
begun only where the minutes that are left hold what it takes on an H200, and one that fails leaves the minutes to the
others. Whole calls are timed without waiting between their phases (`pipelines.timing`). At the end what was reached is
held against what is asked (`ASKED`). No page has these figures yet, for it has run on a CPU alone: those of the pages
are from `bench_gpu.sh`.
"""

import argparse
import gc
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gpu_check import check

from sparse_context import apply_sparse_context, remove_sparse_context
from sparse_context.bench.blocks import bench_blocks
from sparse_context.bench.build import build_pipeline
from sparse_context.bench.calls import bench
from sparse_context.bench.config import BenchConfig
from sparse_context.bench.figures import Figures
from sparse_context.bench.shapes import SHAPES
from sparse_context.embedded.demo import read_examples
from sparse_context.families.shape import Shape
from sparse_context.pipelines.load import find_device, speed_up_vae
from sparse_context.pipelines.timing import now, timed
from sparse_context.result import checkout, write_result

ROOT = Path(__file__).resolve().parents[1]
KEEP = 0.1

ASKED = {
    ("four", "sparse", "total"): 3.3,
    ("four", "sparse_kv", "total"): 3.8,
    ("four", "sparse_cached", "total"): 4.0,
    ("four", "sparse", "denoise"): 4.43,
    ("four", "sparse_kv", "denoise"): 5.45,
    ("one", "sparse", "total"): 1.7,
}
"""At 1024 x 1024 pixels and keep 0.1 on klein-9B, by part, method and phase: at least so many times faster than
dense."""

MOST_CHOOSING = 0.04
"""Of a sparse call with four references."""


@dataclass
class Kit:
    """What the parts are run with. `pipe` is the one that was built last."""

    device: torch.device
    tiny: bool
    shape: str = ""
    pipe: Any = None

    @property
    def size(self) -> int:
        return 128 if self.tiny else 1024  # half of it is the least that the pipeline takes

    def shape_of(self, name: str) -> Shape:
        """A shape, or one like it in miniature."""
        shape = SHAPES[name]
        if not self.tiny:
            return shape
        encoder = shape.encoder and dict(
            num_hidden_layers=28,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            vocab_size=151_936,
            hidden_size=4,
            intermediate_size=8,
        )
        return replace(shape, heads=2, double_blocks=2, single_blocks=2, text_width=12, encoder=encoder, text=12)

    def build(self, name: str) -> Any:
        """The pipeline of a shape; the one before it is let go."""
        if self.shape != name:
            self.pipe = None
            gc.collect()
            torch.cuda.empty_cache()
            dtype = torch.float32 if self.tiny else torch.bfloat16
            self.pipe, self.shape = build_pipeline(self.shape_of(name), self.device, dtype), name
        return self.pipe

    def bench(self, name: str, references: int, size: int | None = None, **settings: Any) -> dict[str, Any]:
        """Whole calls by every method."""
        size = size or self.size
        scene = next(each for each in read_examples() if len(each["references"]) == 4)
        config = BenchConfig((references,), (KEEP,), (size,), **{"turns": 1 if self.tiny else 5, **settings})
        return asdict(bench(self.build(name), scene["references"], scene["prompt"], config))


def encoding(kit: Kit) -> dict[str, Any]:
    """The VAE on one picture, and on four of half the side: as a batch, one by one, and as `ModelSpec.vae` has it."""
    vae, figures = kit.build("klein-9b").vae, {}
    expected: dict[int, torch.Tensor] = {}
    for way in ("as loaded", "channels-last", "compiled"):
        if way != "as loaded":
            speed_up_vae(vae, way)
        for count, side in ((1, kit.size), (4, kit.size // 2)):
            pixels = torch.rand(count, side, side, 3, generator=torch.Generator().manual_seed(0)).permute(0, 3, 1, 2)
            pixels = (2 * pixels - 1).to(kit.device, vae.dtype)
            for batch in {1, count}:
                seconds, latents = _encode(vae, pixels, batch, kit)
                difference = float((latents - expected.setdefault(count, latents)).abs().max())
                name = f"{count} of {side} pixels, {batch} at a time, {way}"
                figures[name] = {"seconds": seconds, "difference": difference}
    kit.shape, kit.pipe = "", None  # compiled, which no other part is to find
    return figures


@torch.no_grad()
def _encode(vae: Any, pixels: torch.Tensor, batch: int, kit: Kit) -> tuple[float, torch.Tensor]:
    """The median seconds of encoding so many pictures at a time, and the latents."""
    seconds = []
    for turn in range(2 if kit.tiny else 6):
        start = now(kit.device)
        made = [vae.encode(part).latent_dist.mode() for part in pixels.split(batch)]
        if turn:
            seconds.append(now(kit.device) - start)
    return round(median(seconds), 5), torch.cat(made).float().cpu()


def compiled_blocks(kit: Kit) -> dict[str, Any]:
    """Denoising by compiled blocks, dense and sparse: seconds, the first call, which compiles, apart."""
    pipe = kit.build("klein-9b")
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.compile_repeated_blocks(fullgraph=True, dynamic=True)
    scene = next(each for each in read_examples() if len(each["references"]) == 4)
    references = [picture.convert("RGB").resize((kit.size, kit.size)) for picture in scene["references"]]
    figures: dict[str, Any] = {}
    for name in ("sparse", "dense"):
        apply_sparse_context(pipe, keep=KEEP) if name == "sparse" else remove_sparse_context(pipe)
        seconds = []
        for _ in range(2 if kit.tiny else 4):
            with timed(pipe) as times:
                pipe(
                    image=references,
                    prompt=scene["prompt"],
                    height=kit.size,
                    width=kit.size,
                    num_inference_steps=4,
                    guidance_scale=1.0,
                    generator=torch.Generator().manual_seed(0),
                )
            seconds.append(asdict(times))
        figures[name] = {"first": seconds[0], "denoise": round(median(each["denoise"] for each in seconds[1:]), 4)}
    kit.shape, kit.pipe = "", None  # compiled, which no other part is to find
    return figures


def training(kit: Kit, folder: Path) -> dict[str, Any]:
    """Steps of LoRA fine-tuning at klein-4B's shape, by the script for them."""
    kit.shape, kit.pipe = "", None
    gc.collect()
    torch.cuda.empty_cache()
    target = folder / "training-step.json"
    tiny = ["--size", "64", "--blocks", "1", "--turns", "1"] if kit.tiny else []
    command = [sys.executable, str(ROOT / "runs" / "time_klein_training.py"), "--output", str(target)]
    subprocess.run([*command, "--device", str(kit.device), *tiny], check=True)
    return json.loads(target.read_text(encoding="utf-8"))["figures"]


def dev_blocks(kit: Kit) -> dict[str, Any]:
    """A double and a single block of FLUX.2-dev, four references."""
    methods = ("dense", "kv", "sparse", "sparse_kv", "no_references")
    config = BenchConfig((4,), (KEEP,), (kit.size,), methods=methods, turns=1 if kit.tiny else 5, steps=4)
    dtype = torch.float32 if kit.tiny else torch.bfloat16
    return asdict(bench_blocks(kit.shape_of("flux2-dev"), 1, kit.device, dtype, config))


PARTS: dict[str, tuple[int, Callable[[Kit, Path], dict[str, Any]]]] = {
    "check": (25, lambda kit, _: check(kit.device)),
    "klein-9b-four": (120, lambda kit, _: kit.bench("klein-9b", 4)),
    "klein-9b-one": (60, lambda kit, _: kit.bench("klein-9b", 1)),
    "klein-9b-eight": (75, lambda kit, _: kit.bench("klein-9b", 8, turns=1 if kit.tiny else 2)),
    "encoding": (60, lambda kit, _: encoding(kit)),
    "klein-4b-four": (70, lambda kit, _: kit.bench("klein-4b", 4)),
    "klein-9b-four-small": (35, lambda kit, _: kit.bench("klein-9b", 4, kit.size // 2)),
    "flux2-dev-blocks": (25, lambda kit, _: dev_blocks(kit)),
    "compiled-blocks": (90, lambda kit, _: compiled_blocks(kit)),
    "training-step": (60, training),
}
"""In the order of worth: about how many seconds on an H200, and what is done."""


def reached(folder: Path) -> dict[str, tuple[float, float, bool]]:
    """What is asked of the parts that are done: value, bound, whether it is reached."""
    found: dict[str, tuple[float, float, bool]] = {}
    for (part, method, phase), least in ASKED.items():
        file = folder / f"klein-9b-{part}.json"
        if file.is_file():
            row = _row(file, method)
            value = row.speedup[phase].median
            found[f"{part}: {method} to dense, {phase}"] = value, least, value >= least
    file = folder / "klein-9b-four.json"
    if file.is_file():
        seconds = _row(file, "sparse").seconds
        share = seconds["selection"].median / seconds["total"].median
        found["four: choosing's share of the sparse call"] = share, MOST_CHOOSING, share <= MOST_CHOOSING
    return found


def _row(file: Path, method: str) -> Any:
    figures = Figures(**json.loads(file.read_text(encoding="utf-8"))["figures"])
    return next(row for row in figures.rows if row.method == method)


def main() -> None:
    parser = argparse.ArgumentParser(description="Everything that is to be known of a CUDA GPU, part by part.")
    parser.add_argument("--minutes", type=float, default=60.0, help="no part is begun that would take longer")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to rehearse")
    parser.add_argument("--folder", type=Path, help="results/gpu, or checkpoints/gpu-rehearsal with --tiny")
    arguments = parser.parse_args()
    checkout()  # of the code that runs, whatever is committed meanwhile
    end = time.monotonic() + 60 * arguments.minutes
    folder = arguments.folder or (ROOT / ("checkpoints/gpu-rehearsal" if arguments.tiny else "results/gpu"))
    folder.mkdir(parents=True, exist_ok=True)
    kit, failed = Kit(find_device(arguments.device), arguments.tiny), []
    for name in arguments.parts:
        seconds, part = PARTS[name]
        target = folder / f"{name}.json"
        if target.is_file():
            print(f"{name}: done before")
            continue
        if not arguments.tiny and time.monotonic() + seconds > end:
            print(f"{name}: wants {seconds} s, and {max(0, end - time.monotonic()):.0f} s are left: run this again")
            break
        start = time.monotonic()
        try:
            figures = part(kit, folder)
        except Exception as error:  # whatever a part cannot do, the minutes are for the others too
            traceback.print_exc()
            print(f"{name}: FAILED ({type(error).__name__}), the next one follows", flush=True)
            kit.shape, kit.pipe = "", None
            failed.append(name)
            continue
        about = {
            "device": _name(kit.device),
            "keep": KEEP,
            "tiny": kit.tiny,
            "took": round(time.monotonic() - start, 1),
        }
        write_result(target, "gpu", about, figures)
        print(f"{name}: {about['took']} s", flush=True)
    for name, (value, bound, is_reached) in reached(folder).items():
        print(f"{'yes' if is_reached else 'NO ':3} {name}: {value:.2f}, asked {bound:g}")
    if failed:
        sys.exit(f"gpu: {', '.join(failed)} failed; run this again for {'it' if len(failed) == 1 else 'them'} alone.")


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


if __name__ == "__main__":
    main()
