"""What the benchmark knows of each kind of transformer: how it is built, what a forward takes, and what that costs.

    build(shape) -> transformer
    arguments(transformer, shape, tokens, mode) -> keyword arguments
    flops(shape, tokens, mode) -> int

To add a kind, write these and give it a line in `KINDS`. `build` makes a transformer of diffusers on the device that is
torch's default there. `arguments` are those of one forward with batch 1, random, on the transformer's own device and in
its dtype; the places of the tokens are any, because time depends on shapes alone. `flops` are those of that forward, a
multiply and an add being two; norms and activations are not counted. `mode` is the transformer's `kv_cache_mode`, and
None wherever a kind does not reuse keys and values.
"""

from collections.abc import Mapping

from ..families.flux2.bench import build_flux2, flux2_arguments, flux2_flops
from ..families.flux3.bench import build_flux3, flux3_arguments, flux3_flops
from ..families.kontext.bench import build_flux, build_longcat, flux_arguments, flux_flops
from ..families.qwen.bench import build_qwen_image, qwen_image_arguments
from ..families.shape import Kind, Shape

KINDS: Mapping[str, Kind] = {
    "flux2": Kind(build_flux2, flux2_arguments, flux2_flops, kv=True),
    "flux": Kind(build_flux, flux_arguments, flux_flops),
    "longcat": Kind(build_longcat, flux_arguments, flux_flops),
    "qwen_image": Kind(build_qwen_image, qwen_image_arguments, flux_flops),
    "flux3": Kind(build_flux3, flux3_arguments, flux3_flops, alike=False),
}


_QWEN3 = {
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
}


SHAPES: Mapping[str, Shape] = {
    "klein-4b": Shape(24, 5, 20, 7_680, _QWEN3 | {"hidden_size": 2_560, "intermediate_size": 9_728}),
    "klein-9b": Shape(32, 8, 24, 12_288, _QWEN3 | {"hidden_size": 4_096, "intermediate_size": 12_288}),
    "flux2-dev": Shape(48, 8, 48, 15_360, {}, steps=28, guidance=True),
    "kontext": Shape(24, 19, 38, 4_096, {}, steps=28, guidance=True, channels=64, kind="flux", pooled=768),
    "longcat-edit": Shape(24, 10, 20, 3_584, {}, steps=50, channels=64, text=512 + 18 * 18, kind="longcat"),
    "qwen-edit": Shape(24, 60, 0, 3_584, {}, steps=50, channels=64, kind="qwen_image"),
    "flux3-klein": Shape(24, 5, 28, 20_480, {}, steps=16, guidance=True, text=560, kind="flux3"),
}


def find_shape(name: str) -> Shape:
    """The shape called `name`. Raises ValueError that names all."""
    if name not in SHAPES:
        raise ValueError(f"random-weights is {name!r}: choose {', '.join(SHAPES)}.")
    return SHAPES[name]
