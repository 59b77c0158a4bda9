"""A LoRA made of a full fine-tuning: of what that changed, the directions that carry most. Also how one is written."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn


def save_lora(tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a LoRA so that equal tensors and metadata are equal bytes.

    safetensors orders metadata differently each time, and peft the names in its settings, which are sets.
    """
    said = dict(sorted(metadata.items()))
    if "lora_adapter_metadata" in said:
        settings = json.loads(said["lora_adapter_metadata"])
        for name, value in settings.items():
            if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
                settings[name] = sorted(value)
        said["lora_adapter_metadata"] = json.dumps(settings, indent=2, sort_keys=True)
    save_file(dict(tensors), path, said)
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size)) | {"__metadata__": said}
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        file.seek(8)
        file.write(text.ljust(size))  # the same letters in another order


@torch.no_grad()
def extract_lora(base: nn.Module, tuned: nn.Module, rank: int | Callable[[str], int]) -> dict[str, torch.Tensor]:
    """The change of every linear layer from `base` to `tuned` as a LoRA: of each the nearest of `rank`, by SVD.

    Two transformers of the same shapes, whose prefix in the result is that of diffusers' LoRA files: save it with
    safetensors, and `pipe.load_lora_weights` reads it (alpha equals the rank). Layers of fewer rows or columns take
    as many directions as they have. Biases, norms and convolutions stay those of the base, so a little of the change is
    left out even at full rank. On the CPU, in float32. rank: for all layers, or a function of a layer's name; a layer
    of rank 0 is left out. Raises ValueError for a rank below 1 and for other shapes.
    """
    if not callable(rank) and not rank >= 1:
        raise ValueError(f"rank is {rank!r}: pass a whole number, 1 or more.")
    others = dict(tuned.named_modules())
    lora = {}
    for name, layer in base.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        other = others.get(name)
        if not isinstance(other, nn.Linear) or other.weight.shape != layer.weight.shape:
            raise ValueError(f"{name} is not the same kind of layer in both models: pass a fine-tuning of this base.")
        directions = rank(name) if callable(rank) else rank
        if not directions:
            continue
        change = other.weight.float().cpu() - layer.weight.float().cpu()
        left_vectors, strengths, right_vectors = torch.linalg.svd(change, full_matrices=False)
        root = strengths[:directions].sqrt()
        lora[f"transformer.{name}.lora_A.weight"] = (root[:, None] * right_vectors[:directions]).contiguous()
        lora[f"transformer.{name}.lora_B.weight"] = (left_vectors[:, :directions] * root).contiguous()
    return lora
