"""What is shipped: the averaged weights and the scenes of the demo."""

import json
import shutil
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from transformers import Qwen2Tokenizer

from sparse_context.images import save_text
from sparse_context.pipelines.embedded import ADAPTERS, OVERVIEW, adapter_record
from sparse_context.training.cache import fingerprint
from sparse_context.training.checkpoints import load_average
from sparse_context.training.optimisers import drawn_from

from .base import LATENTS, steps_before
from .data import load_assets
from .model import TEXT_LAYERS, TEXT_LENGTH, make_pipeline, make_text_encoder, make_transformer
from .run_folder import swap_in
from .samples import tasks_of
from .scenes import REFERENCE, SIZE, make_scene
from .vae import load_vae


def export(folder: Path, destination: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write the averaged weights as a pipeline in the diffusers layout, with the call settings beside it.

    dtype: bf16 as the package holds it; in float32 `restore` goes on from what was trained, without rounding. All is
    written beside it first, so a kill leaves what was there, or an `.old` part of it for the moment of a rename.
    Adapters that lie there and were trained on other weights are removed. Raises ValueError where the VAE was trained
    after the base, which does not know its latents then.
    """
    vae, knows = load_vae(folder), folder / "base" / LATENTS
    if knows.is_file() and knows.read_text(encoding="utf-8").strip() != fingerprint(vae.encoder):
        raise ValueError(f"The VAE in {folder / 'vae'} was trained after the base, which has to follow: run `base`.")
    tokenizer = Qwen2Tokenizer.from_pretrained(folder / "tokenizer")
    with drawn_from(0):  # and then loaded
        modules = nn.ModuleDict({"transformer": make_transformer(), "text_encoder": make_text_encoder(tokenizer)})
    step = load_average(folder / "base", modules) + steps_before(folder)
    pipe = make_pipeline(vae, modules["transformer"], modules["text_encoder"], tokenizer)
    pipe.vae.register_to_config(_name_or_path="")  # else its config names the working folder of this machine
    pipe.to(dtype=dtype)
    now = fingerprint(pipe.transformer.float())  # adapters were trained on these values as they are in bf16
    pipe.to(dtype=dtype)
    partial = destination.with_name(destination.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipe.save_pretrained(partial, safe_serialization=True)
    # Loaded without a dtype, diffusers makes its parts float32, and transformers what this says: they have to agree
    config = partial / "text_encoder" / "config.json"
    encoder = json.loads(config.read_text(encoding="utf-8"))
    save_text(json.dumps(encoder | {"dtype": "float32"}, indent=2) + "\n", config)
    settings = {
        "height": SIZE,
        "width": SIZE,
        "reference_size": {"edit": SIZE, "subject": REFERENCE},
        "max_references": 4,
        "num_inference_steps": 8,
        "max_sequence_length": TEXT_LENGTH,
        "text_encoder_out_layers": list(TEXT_LAYERS),
        "training_steps": step,
    }
    save_text(json.dumps(settings, indent=2) + "\n", partial / "call.json")
    destination.mkdir(parents=True, exist_ok=True)
    for adapter in (*(destination / own.name for own in ADAPTERS.values()), destination.with_name(OVERVIEW.name)):
        if adapter.is_file() and adapter_record(adapter).get("base_weights") != now:
            adapter.unlink()
    for part in sorted(partial.iterdir()):
        swap_in(part, destination / part.name)
    partial.rmdir()


def export_examples(folder: Path, destination: Path, scenes: dict[str, tuple[str, int]]) -> None:
    """Write scenes of the test split for the demo: pictures as lossless webp, and `scenes.json` that lists them.

    `scenes` maps a name to (task, seed).
    """
    assets = load_assets(folder / "assets.safetensors").split("test")
    destination.mkdir(parents=True, exist_ok=True)
    listing = []
    for name, (task, seed) in scenes.items():
        scene = make_scene(assets.without_objects() if name in PHOTOGRAPHS else assets, task, seed)
        files = [f"{name}-{i + 1}.webp" for i in range(len(scene.references))]
        for file, picture in zip([*files, f"{name}-truth.webp"], [*scene.references, scene.target], strict=True):
            Image.fromarray(picture).save(destination / file, lossless=True, method=6)
        listing.append(
            {
                "name": name,
                "task": scene.task,
                "tasks": tasks_of(scene),
                "prompt": scene.prompt,
                "references": files,
                "truth": f"{name}-truth.webp",
            }
        )
    save_text(json.dumps(listing, indent=2) + "\n", destination / "scenes.json")


EXAMPLES = {
    "background": ("edit_background", 6),
    "background-2": ("edit_background", 7),
    "negative": ("edit_global", 15),
    "grey": ("edit_global", 11),
    "sepia": ("edit_global", 85),
    "recoloured": ("edit_object", 12),
    "placed": ("subject_place", 9),
    "side-by-side": ("subject_pair", 3),
    "in-front": ("subject_scene", 6),
    "quarters": ("subject_quarters", 15),
}
"""The demo's scenes: name -> (task, seed). Chosen by their references and truths, before any output was seen. Not so
the edits of the whole picture: those were looked for among the first 150 seeds, for scenes in which an overview with a
fifth of the tokens is at least 6 dB ahead of dropping."""


PHOTOGRAPHS = ("negative",)
"""Those of a whole photograph, with nothing pasted into it."""
