"""Whether a device computes what the CPU's tests hold: on a small pipeline in the shape of klein, in float32.

Used by gpu.py. Each check gives the largest difference between two ways to the same latents, and the most that is
allowed.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from diffusers.models.transformers import transformer_flux2
from PIL import Image

from sparse_context import ReferenceCache, apply_sparse_context, context, last_selection, remove_sparse_context
from sparse_context.bench.build import build_pipeline
from sparse_context.bench.shapes import SHAPES
from sparse_context.families.pixels import preprocess_lazily

SIZE, KEEP, TOLERANCE = 128, 0.3, 1e-3
SMALL = replace(SHAPES["klein-4b"], heads=2, double_blocks=2, single_blocks=2, text_width=96, text=12, encoder={})


def check(device: torch.device) -> dict[str, dict[str, Any]]:
    """Every check: its difference, what is allowed, and whether it holds."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    pipe = build_pipeline(SMALL, device, torch.float32)
    pipe.set_progress_bar_config(disable=True)
    references = [_picture(seed) for seed in range(3)]
    figures: dict[str, dict[str, Any]] = {}

    def call() -> torch.Tensor:
        embeds = torch.randn(1, SMALL.text, SMALL.text_width, generator=torch.Generator().manual_seed(1)).to(device)
        return pipe(
            image=references,
            prompt_embeds=embeds,
            height=SIZE,
            width=SIZE,
            num_inference_steps=2,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).images

    def note(name: str, one: torch.Tensor, other: torch.Tensor, allowed: float = 0.0) -> None:
        difference = float((one.float().cpu() - other.float().cpu()).abs().max())
        figures[name] = {"difference": difference, "allowed": allowed, "holds": difference <= allowed}

    dense = call()
    apply_sparse_context(pipe, keep=1.0)
    note("keeping all is the untouched pipeline", call(), dense)
    for dtype in (torch.float32, torch.bfloat16):
        plain = pipe.image_processor.preprocess(references[0]).to(device=device, dtype=dtype)
        lazy = preprocess_lazily(pipe.image_processor)(references[0]).to(device=device, dtype=dtype)
        note(f"pixels as bytes, {dtype}".replace("torch.", ""), lazy, plain)
    apply_sparse_context(pipe, keep=KEEP)
    sparse = call()
    selection = last_selection(pipe)
    note("a second call", call(), sparse)
    note("choosing while encoding, and after it", _afterwards(call), sparse)
    apply_sparse_context(pipe, keep=KEEP, together=True)
    note("references one by one, and as a batch", call(), sparse, TOLERANCE)
    apply_sparse_context(pipe, keep=KEEP, cache=ReferenceCache())
    for when in ("first seen", "remembered"):
        note(f"references {when}", call(), sparse)
    remove_sparse_context(pipe)
    dropped = np.setdiff1d(np.arange(selection.total), selection.index)
    note("dropping is masking in every block", _masked(call, dropped, selection.total), sparse, TOLERANCE)
    apply_sparse_context(pipe, keep=KEEP, overview=4)
    with_overview = call()
    note("a second call with overviews", call(), with_overview)
    apply_sparse_context(pipe, keep=KEEP)
    if device.type == "cuda":
        pipe.enable_model_cpu_offload(device=device)
        note("offloaded", call(), sparse, TOLERANCE)
        pipe.remove_all_hooks()
        pipe.to(device)
    pipe.transformer.compile_repeated_blocks(fullgraph=True, dynamic=True)
    note("compiled blocks", call(), sparse, TOLERANCE)
    return figures


def _picture(seed: int) -> Image.Image:
    """Smooth colours, a hard edge and noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIZE, :SIZE]
    pixels = np.stack([x * 2.0, y * 2.0, (x + y) % 97 * 2.0], -1)
    pixels[32:64, 32:64] = rng.integers(0, 256, 3)
    return Image.fromarray(np.clip(pixels + rng.normal(0, 4, pixels.shape), 0, 255).astype(np.uint8))


def _afterwards(call: Callable[[], torch.Tensor]) -> torch.Tensor:
    """A call in which nothing is chosen before the references are encoded."""
    has_accelerator = context._has_accelerator
    context._has_accelerator = lambda pipe: False
    try:
        return call()
    finally:
        context._has_accelerator = has_accelerator


def _masked(call: Callable[[], torch.Tensor], dropped: np.ndarray, total: int) -> torch.Tensor:
    """A dense call in which no query may look at the dropped tokens, the last ones of which are those of references."""
    attend = transformer_flux2.dispatch_attention_fn

    def attend_masked(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        allowed = torch.ones(key.shape[1], dtype=torch.bool, device=key.device)
        allowed[key.shape[1] - total + torch.from_numpy(dropped).to(key.device)] = False
        return attend(query, key, value, **{**kwargs, "attn_mask": allowed.view(1, 1, 1, -1)})

    transformer_flux2.dispatch_attention_fn = attend_masked
    try:
        return call()
    finally:
        transformer_flux2.dispatch_attention_fn = attend
