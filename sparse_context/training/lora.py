"""A LoRA made of a full fine-tuning: of what that changed, the directions that carry most."""

import torch
from torch import nn


@torch.no_grad()
def extract_lora(base: nn.Module, tuned: nn.Module, rank: int) -> dict[str, torch.Tensor]:
    """The change of every linear layer from `base` to `tuned` as a LoRA: of each the nearest of `rank`, by SVD.

    Two transformers of the same shapes, whose prefix in the result is that of diffusers' LoRA files: save it with
    safetensors, and `pipe.load_lora_weights` reads it (alpha equals the rank). Layers of fewer rows or columns take
    as many directions as they have. Biases, norms and convolutions stay those of the base, so a little of the change is
    left out even at full rank. On the CPU, in float32. Raises ValueError for a rank below 1 and for other shapes.
    """
    if not rank >= 1:
        raise ValueError(f"rank is {rank!r}: pass a whole number, 1 or more.")
    others = dict(tuned.named_modules())
    lora = {}
    for name, layer in base.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        other = others.get(name)
        if not isinstance(other, nn.Linear) or other.weight.shape != layer.weight.shape:
            raise ValueError(f"{name} is not the same kind of layer in both models: pass a fine-tuning of this base.")
        change = other.weight.float().cpu() - layer.weight.float().cpu()
        left, strengths, right = torch.linalg.svd(change, full_matrices=False)
        root = strengths[:rank].sqrt()
        lora[f"transformer.{name}.lora_A.weight"] = (root[:, None] * right[:rank]).contiguous()
        lora[f"transformer.{name}.lora_B.weight"] = (left[:, :rank] * root).contiguous()
    return lora
