"""A pack for a real ComfyUI, in tests and runs alone: its loaders of models, text encoders and VAEs give tiny ones with
random weights, whatever the file that they are asked for holds. So graphs for real models run on a CPU as they are.
"""

import hashlib
import sys
from pathlib import Path
from typing import Any

import comfy.sd
import comfy.taesd.taehv
import comfy.taesd.taesd
import node_helpers
import nodes
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

import comfyui_core as core  # noqa: E402


def kind_of(file: str) -> str:
    """The kind of model that a file name stands for."""
    return (
        "flux" if "kontext" in file or file == "ae.safetensors" else "qwen_image" if "qwen_image" in file else "flux2"
    )


class TinyClip:
    """A text encoder: the same text gives the same random tokens."""

    def tokenize(self, text: str, **more: Any) -> str:
        return text

    def encode_from_tokens_scheduled(self, tokens: str, **more: Any) -> list:
        seed = int(hashlib.sha256(tokens.encode()).hexdigest()[:8], 16)
        return core.draw_prompt([], seed=seed)


def tiny_vae(kind: str) -> Any:
    """A tiny autoencoder of the core for this kind, with random weights."""
    channels = {"flux2": 128, "flux": 16, "qwen_image": 16}[kind]
    module = comfy.taesd.taehv.TAEHV if kind == "qwen_image" else comfy.taesd.taesd.TAESD
    weights = module(latent_channels=channels).state_dict()
    generator = torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        if weight.ndim > 1:
            weight.copy_(torch.randn(weight.shape, generator=generator) * (2 / weight[0].numel()) ** 0.5)
        elif not name.startswith("vae_"):
            weight.fill_(1 if name.endswith("weight") else 0)
    return comfy.sd.VAE(sd=weights, metadata={"tae_latent_channels": channels})


class TinyTextEncodeQwenImageEditPlus:
    """The core's node of the name behind "Tiny", without the megapixel that it scales every picture to."""

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "encode"
    CATEGORY = "tiny"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        images = {f"image{i}": ("IMAGE",) for i in (1, 2, 3)}
        return {"required": {"clip": ("CLIP",), "prompt": ("STRING",)}, "optional": {"vae": ("VAE",), **images}}

    def encode(self, clip: Any, prompt: str, vae: Any = None, **images: Any) -> tuple[Any]:
        latents = [vae.encode(image[..., :3]) for image in images.values()]
        prompted = clip.encode_from_tokens_scheduled(prompt)
        return (node_helpers.conditioning_set_values(prompted, {"reference_latents": latents}, append=True),)


class TinySAM3_Detect:  # noqa: N801
    """The core's node of the name behind "Tiny", which finds everything in the middle of a picture."""

    RETURN_TYPES = ("MASK", "BOUNDING_BOX")
    FUNCTION = "detect"
    CATEGORY = "tiny"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        ways = {"threshold": ("FLOAT",), "refine_iterations": ("INT",), "individual_masks": ("BOOLEAN",)}
        return {"required": {"model": ("MODEL",), "image": ("IMAGE",), "conditioning": ("CONDITIONING",), **ways}}

    def detect(self, image: torch.Tensor, **more: Any) -> tuple[torch.Tensor, list]:
        mask = torch.zeros(image.shape[:3])
        mask[:, image.shape[1] // 4 : -image.shape[1] // 4, image.shape[2] // 4 : -image.shape[2] // 4] = 1
        return mask, []


NODE_CLASS_MAPPINGS = {
    "TinySAM3_Detect": TinySAM3_Detect,
    "TinyTextEncodeQwenImageEditPlus": TinyTextEncodeQwenImageEditPlus,
}

nodes.UNETLoader.load_unet = lambda self, unet_name, weight_dtype: (core.build(kind_of(unet_name)),)
nodes.CLIPLoader.load_clip = lambda self, clip_name, type, device="default": (TinyClip(),)
nodes.DualCLIPLoader.load_clip = lambda self, clip_name1, clip_name2, type, device="default": (TinyClip(),)
nodes.CheckpointLoaderSimple.load_checkpoint = lambda self, ckpt_name: (core.build("flux2"), TinyClip(), None)
nodes.VAELoader.load_vae = lambda self, vae_name: (tiny_vae(kind_of(vae_name)),)
