"""The embedded model trained further on a GPU that is there for minutes: VAE, base and what is fine-tuned from it.

    python runs/train_mini_gpu.py pack                      # where the assets are: all of training in 20 MB
    python runs/train_mini_gpu.py train --pack FILE --output FOLDER --vae 40 --base 315 --sparse 115 --kv 50

`pack` writes the training pictures as webp (the objects' colours and the photographs slightly lossy, alpha exact), for
a machine with little time or no network; `python -m recipes.mini data` makes the whole there as well.

`train` goes on from the package's weights, for `--vae`, `--base`, `--sparse` and `--kv` seconds by the clock, so that
nothing has to be known of the machine's speed; 0 leaves one out. The assets are what `--pack` holds, or lie in
`--folder`: `python -m recipes.mini data --folder checkpoints/gpu`. The fine-tunings for dropped tokens are of
all weights and begin with what the package's LoRAs change, or from nothing where it has none, at 1.5 times the recipes'
learning rates, for their batches are larger. LoRAs are cut from them that fit the package (`CUTS`).

The package gets all of it; where the base is another one now, the LoRAs of the former are removed. The output gets
`package`, which takes the place of sparse_context/embedded/weights on another machine, `exact`, the base in float32,
from which `--weights` goes on the next time without rounding, the fine-tuned transformers, from which `mini adapter
--folder OUTPUT --name sparse --scale S --rank R` cuts other LoRAs, logs and sample sheets. It does not resume: what was
killed begins anew, in another folder, and from the package as it was (`git checkout sparse_context/embedded/weights`).
How the shipped weights were made, sparse_context/embedded/README.md says.
"""

import argparse
import io
import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from recipes.mini.base import BaseConfig, restore, train_base
from recipes.mini.data import load_assets
from recipes.mini.export import export
from recipes.mini.sparse import FULL, FULL_KV, export_adapter, train_sparse
from recipes.mini.vae import VaeConfig, train_vae
from sparse_context.pipelines.embedded import ADAPTERS, WEIGHTS

ROOT = Path(__file__).resolve().parents[1]
FOREVER = 10**6  # steps and checkpoints of a run by the clock
QUALITY = 93
CUTS = {"sparse": (0.6, 44), "sparse-kv": (1.0, 32)}
"""Share and rank of the LoRA of each fine-tuning: with the base they have to be below 34 MiB."""
MIX = {
    "edit_background": 0.07,
    "edit_object": 0.07,
    "edit_global": 0.07,
    "edit_remove": 0.01,
    "subject_place": 0.27,
    "subject_scale": 0.03,
    "subject_pair": 0.17,
    "subject_scene": 0.13,
    "subject_quarters": 0.18,
}


def pack(assets: Path, destination: Path) -> None:
    """The training split of `assets`, and for the sample sheets some of the validation split, as one small file."""
    everything = load_assets(assets)

    def files(pictures: np.ndarray, split: np.ndarray, held_out: int) -> dict[str, np.ndarray]:
        chosen = np.concatenate([np.flatnonzero(split == 0), np.flatnonzero(split == 1)[:held_out]])
        made = []
        for picture in pictures[chosen]:
            file = io.BytesIO()
            Image.fromarray(picture).save(file, "webp", quality=QUALITY, alpha_quality=100)
            made.append(np.frombuffer(file.getvalue(), np.uint8))
        return {"": np.concatenate(made), "_ends": np.cumsum([len(one) for one in made]), "_split": split[chosen]}

    parts = {
        "object": files(everything.objects, everything.object_split, 60),
        "photo": files(everything.photos, everything.photo_split, 10),
    }
    save_file(
        {f"{name}{part}": array for name, part_of in parts.items() for part, array in part_of.items()}, destination
    )
    print(f"wrote {destination}, {destination.stat().st_size / 2**20:.1f} MiB")


def unpack(packed: Path, destination: Path) -> None:
    """Write what `pack` packed as the assets that the recipe reads."""
    found = load_file(packed)

    def pictures(name: str, mode: str) -> np.ndarray:
        data = np.split(found[name], found[f"{name}_ends"][:-1])
        with ThreadPoolExecutor() as pool:
            return np.stack(list(pool.map(lambda one: np.asarray(Image.open(io.BytesIO(one)).convert(mode)), data)))

    objects = pictures("object", "RGBA")
    tensors = {
        "objects": objects,
        "photos": pictures("photo", "RGB"),
        "object_split": found["object_split"],
        "photo_split": found["photo_split"],
    }
    destination.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, destination, metadata={"names": json.dumps([""] * len(objects))})


def train(arguments: argparse.Namespace) -> None:
    if arguments.vae and not arguments.base:
        raise ValueError("A VAE that was trained further needs a base that follows: pass --base, or --vae 0.")
    if arguments.weights != WEIGHTS and not arguments.base:
        raise ValueError("The fine-tunings begin from the package's weights: leave --weights out, or pass --base.")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # in the processes that compose
    torch.set_float32_matmul_precision("high")
    folder, output, workers = arguments.folder, arguments.output, arguments.workers
    for path in (folder, output):
        path.mkdir(parents=True, exist_ok=True)

    def copy_records(part: str) -> None:
        """The log, of which a few steps leave none, and the sample sheets."""
        for file in (folder / part).glob("log.jsonl"):
            shutil.copy(file, output / f"{part}.jsonl")
        for file in (folder / part).glob("sheet-*.png"):
            shutil.copy(file, output / f"{part}-{file.name}")

    if arguments.pack is not None:
        unpack(arguments.pack, folder / "assets.safetensors")
    load_assets(folder / "assets.safetensors")  # raises before anything has begun
    adapters = {}
    for name, own in (("sparse", ADAPTERS["plain"]), ("sparse-kv", ADAPTERS["kv"])):
        if (WEIGHTS / own.name).is_file():  # the export of another base removes it
            adapters[name] = Path(shutil.copy(WEIGHTS / own.name, folder / own.name))
    restore(arguments.weights, folder)
    if arguments.vae:
        torch.backends.cudnn.benchmark = True  # one shape; the base has many, and each would be tried anew
        config = VaeConfig(steps=FOREVER, batch=64, crop=128, lr=1e-3, seed=arguments.seed)
        train_vae(folder, config, workers=workers, seconds=arguments.vae)
        torch.backends.cudnn.benchmark = False
        copy_records("vae")
    if arguments.base:
        config = BaseConfig(
            steps=FOREVER,
            batch=arguments.batch,
            repeats=2,
            lr=1.5e-3,
            muon_lr=3e-3,
            ema=0.995,
            seed=arguments.seed,
            mix=tuple(MIX.items()),
        )
        train_base(
            folder,
            config,
            workers=workers,
            seconds=arguments.base,
            save_every=FOREVER,
            show_every=FOREVER,
            compiled=torch.cuda.is_available(),
        )
        copy_records("base")
        export(folder, WEIGHTS)
        export(folder, output / "exact", torch.float32)
    for name, config, seconds in (("sparse", FULL, arguments.sparse), ("sparse-kv", FULL_KV, arguments.kv)):
        if seconds:
            assert config.muon_learning_rate
            config = replace(
                config,
                max_train_steps=FOREVER,
                checkpointing_steps=FOREVER,
                validation_steps=0,
                ema=0.97,
                gradient_accumulation_steps=1,
                learning_rate=1.5 * config.learning_rate,
                muon_learning_rate=1.5 * config.muon_learning_rate,
                seed=arguments.seed,
            )
            made = train_sparse(
                folder,
                config,
                name=name,
                batch=arguments.sparse_batch,
                start=adapters.get(name),
                workers=workers,
                seconds=seconds,
            )
            copy_records(name)
            shutil.copytree(made, output / name / made.name, dirs_exist_ok=True)
            scale, rank = CUTS[name]
            export_adapter(folder / name, scale=scale, rank=rank)
    shutil.copytree(WEIGHTS, output / "package", dirs_exist_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="The embedded model trained further on a GPU.")
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack")
    packing.add_argument("--assets", type=Path, default=ROOT / "checkpoints" / "assets.safetensors")
    packing.add_argument("--output", type=Path, default=ROOT / "checkpoints" / "training.safetensors")
    training = commands.add_parser("train")
    training.add_argument("--pack", type=Path, help="what `pack` wrote; without it, the folder has the assets")
    training.add_argument("--weights", type=Path, default=WEIGHTS, help="to go on from; the package's without it")
    training.add_argument("--folder", type=Path, default=ROOT / "checkpoints" / "gpu")
    training.add_argument("--output", type=Path, default=ROOT / "checkpoints" / "gpu-results")
    training.add_argument("--vae", type=float, default=40, help="seconds")
    training.add_argument("--base", type=float, default=315, help="seconds")
    training.add_argument("--sparse", type=float, default=115, help="seconds")
    training.add_argument("--kv", type=float, default=50, help="seconds")
    training.add_argument("--batch", type=int, default=128, help="the base's, of samples with one small reference")
    training.add_argument("--sparse-batch", type=int, default=96, help="the same for the fine-tunings")
    training.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    training.add_argument("--seed", type=int, default=12, help="another for each run that goes on from the last")
    arguments = parser.parse_args()
    try:
        if arguments.command == "pack":
            pack(arguments.assets, arguments.output)
        else:
            train(arguments)
    except (ValueError, OSError, SafetensorError) as error:
        sys.exit(f"train_mini_gpu: {error}")


if __name__ == "__main__":
    main()
