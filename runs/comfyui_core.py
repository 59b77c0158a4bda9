"""Tiny models with random weights in a real ComfyUI core, and a run of its own sampler: what the tests of the nodes and
their timings share.

The core is the checkout that COMFYUI_DIR names, and this interpreter has what its requirements ask for. Nothing of a
core is a part of this project. A process that calls `start_core` is given to it: the core reads sys.argv and has
packages called `app`, `server` and `utils`.
"""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
PACK = ROOT / "integrations" / "comfyui"
KINDS = ("flux2", "flux", "qwen_image")
METHODS = {
    "flux2": ("index", "offset", "uxo", "index_timestep_zero"),
    "flux": ("offset",),
    "qwen_image": ("index", "index_timestep_zero", "offset", "negative_index"),
}
"""Of each kind, ComfyUI's ways to place references."""


def load_pack() -> ModuleType:
    """The nodes as the package `sparse_context_nodes`; importing it needs no core."""
    if "sparse_context_nodes" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "sparse_context_nodes", PACK / "__init__.py", submodule_search_locations=[str(PACK)]
        )
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    return sys.modules["sparse_context_nodes"]


def start_core(*options: str) -> str:
    """Make `comfy` importable, on the CPU and with the core's own options; returns its version."""
    sys.path.insert(0, os.environ["COMFYUI_DIR"])
    sys.argv = [sys.argv[0], "--cpu", *options]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfyui_version

    return comfyui_version.__version__


def build(kind: str, width: int = 64, heads: int = 2, blocks: int = 2, seed: int = 0) -> Any:
    """A ModelPatcher with a model of this kind, its weights random, in float32."""
    import comfy.model_patcher
    import comfy.supported_models

    head = width // heads
    flux = {
        "vec_in_dim": None,
        "context_in_dim": 48,
        "hidden_size": width,
        "num_heads": heads,
        "depth": blocks,
        "depth_single_blocks": blocks,
    }
    configs = {
        "flux2": dict(
            **flux,
            in_channels=128,
            out_channels=128,
            mlp_ratio=3.0,
            axes_dim=[head // 4] * 4,
            theta=2000,
            patch_size=1,
            qkv_bias=False,
            guidance_embed=False,
            txt_ids_dims=[3],
            global_modulation=True,
            mlp_silu_act=True,
            ops_bias=False,
            default_ref_method="index",
            ref_index_scale=10.0,
        ),
        "flux": dict(
            **flux | {"vec_in_dim": 32},
            in_channels=16,
            out_channels=16,
            mlp_ratio=4.0,
            axes_dim=[head // 4, head * 3 // 8, head * 3 // 8],
            theta=10000,
            patch_size=2,
            qkv_bias=True,
            guidance_embed=True,
            txt_ids_dims=[],
        ),
        "qwen_image": dict(
            in_channels=64,
            out_channels=16,
            num_layers=blocks,
            attention_head_dim=head,
            num_attention_heads=heads,
            joint_attention_dim=48,
            axes_dims_rope=(head // 4, head * 3 // 8, head * 3 // 8),
        ),
    }
    classes = {"flux2": "Flux2", "flux": "Flux", "qwen_image": "QwenImage"}
    config = getattr(comfy.supported_models, classes[kind])(dict(image_model=kind, **configs[kind]))
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.diffusion_model.named_parameters():
            if "norm" in name and name.endswith(("scale", "weight")) and parameter.ndim == 1:
                parameter.fill_(1)
            else:
                spread = 1 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.1
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def draw_latents(kind: str, rows: int, columns: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Random latents of so many tokens, as the kind's VAE has them."""
    shape = {
        "flux2": (batch, 128, rows, columns),
        "flux": (batch, 16, 2 * rows, 2 * columns),
        "qwen_image": (batch, 16, 1, 2 * rows, 2 * columns),
    }[kind]
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def draw_prompt(references: list[torch.Tensor], method: str | None = None, seed: int = 0, length: int = 12) -> list:
    """A conditioning with a random text of `length` tokens."""
    generator = torch.Generator().manual_seed(100 + seed)
    more: dict[str, Any] = {"pooled_output": torch.randn(1, 32, generator=generator)}
    if references:
        more["reference_latents"] = references
    if method is not None:
        more["reference_latents_method"] = method
    return [[torch.randn(1, length, 48, generator=generator), more]]


def sample(
    model: Any, latent: torch.Tensor, positive: list, negative: list | None = None, steps: int = 2
) -> torch.Tensor:
    """What the core's own sampler makes, by Euler's method. A negative prompt is looked at with a CFG of 3."""
    import comfy.sample

    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(7))
    cfg = 1.0 if negative is None else 3.0
    zeros = torch.zeros_like(latent)
    return comfy.sample.sample(
        model, noise, steps, cfg, "euler", "simple", positive, negative or positive, zeros, disable_pbar=True, seed=7
    )
