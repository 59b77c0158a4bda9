"""What the benchmark needs of a family: the shapes of real models, so that they are timed without their weights.

A family's bench.py has a `Kind` for each of its transformers and `SHAPES`, the sizes of models by name, and imports
torch only inside functions, for the command's help names the shapes. Time and memory depend on shapes alone; what comes
out of random weights means nothing.

Sources: the configs published with each model (black-forest-labs/FLUX.2-klein-4B, FLUX.2-klein-9B, FLUX.2-dev;
Qwen/Qwen3-4B, Qwen/Qwen3-8B), and the defaults of diffusers' `Flux2Transformer2DModel` and `AutoencoderKLFlux2`, which
are those of FLUX.2-dev. The others are the defaults of `FluxTransformer2DModel`, `LongCatImageTransformer2DModel`,
`QwenImageTransformer2DModel` and `Flux3Transformer2DModel`, with the steps and the length of the prompt that their
pipelines use, but for what follows.

No published config was read of these others. That FLUX.1 Kontext embeds the guidance scale follows from its pipeline's
use. LongCat-Image-Edit would have 11.9 B parameters with diffusers' default numbers of blocks: 10 and 20 are those of
the port filipstrand/mflux, and give the 6 B of the report (arXiv:2512.07584). FLUX.3 klein is the step-distilled model,
which also embeds the timestep that a step goes to; it has 5.5 B parameters here, where 5.6 B were announced.
Qwen-Image-Edit also stands for its inpainting and for Edit-Plus, but without what `zero_cond_t` adds in Edit-Plus 2511.

Some texts have no fixed length. LongCat pads the prompt to 512 tokens and adds those of its reference, 18 x 18 for a
megapixel. Qwen-Image-Edit's text is as long as the prompt and its references, where one takes about 200 tokens in
Edit-Plus and 1,400 in the others: 512 stands for it. FLUX.3 pads to multiples of 80: 560 stands for it. LongCat and
Qwen run a second forward at each step, for classifier-free guidance; it would change no ratio and is not counted.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Kind:
    """One kind of transformer, by the functions that a family writes for it.

    build: (shape) -> transformer, of diffusers, on the device that is torch's default there.
    arguments: (transformer, shape, tokens, mode) -> the keyword arguments of one forward with batch 1, random, on the
        transformer's own device and in its dtype; the places of the tokens are any, for time depends on shapes alone.
    flops: (shape, tokens, mode) -> those of that forward, a multiply and an add being two; norms and activations are
        not counted.
    kv: whether it can reuse the references' keys and values, that is, be called in the modes "extract" and "cached". A
        mode is the transformer's `kv_cache_mode`, and None wherever a kind does not reuse them.
    alike: whether all of its blocks cost the same, so that the time of a few says what the whole would take.
    whole: whether the benchmark builds whole pipelines of it (`bench.build.build_pipeline`), and not only blocks.
    """

    build: Callable[["Shape"], Any]
    arguments: Callable[[Any, "Shape", "Tokens", str | None], dict[str, Any]]
    flops: Callable[["Shape", "Tokens", str | None], int]
    kv: bool = False
    alike: bool = True
    whole: bool = False


@dataclass(frozen=True)
class Shape:
    """A transformer, and what it runs with.

    `text_width` is that of the prompt's embeddings: in FLUX.2, three layers of the text encoder side by side.
    `double_blocks` are FLUX.3's per-mode ones, `single_blocks` its joint ones. `channels` of a token. `token` pixels a
    side, `text` tokens of the prompt, and `steps` that the model is called with. `encoder` has the sizes of its text
    encoder, a Qwen3, or is empty where this project does not build it. `guidance`: whether the guidance scale, or in
    FLUX.3 the timestep that a step goes to, is embedded like a timestep. `pooled` is the width of the pooled
    prompt that FLUX.1 has beside the other; 0 for none.
    """

    kind: Kind
    heads: int
    double_blocks: int
    single_blocks: int
    text_width: int
    encoder: Mapping[str, int]
    steps: int = 4
    guidance: bool = False
    head_size: int = 128
    channels: int = 128
    token: int = 16
    text: int = 512
    pooled: int = 0

    @property
    def width(self) -> int:
        return self.heads * self.head_size


def with_blocks(shape: Shape, blocks: int) -> Shape:
    """The shape with `blocks` of each kind of block that it has, in place of all."""
    return replace(shape, double_blocks=blocks, single_blocks=blocks if shape.single_blocks else 0)


@dataclass(frozen=True)
class Tokens:
    """Of one call: text, output, and the references that the transformer gets (0 without any)."""

    text: int
    output: int
    references: int

    @property
    def total(self) -> int:
        return self.text + self.output + self.references


def sizes(shape: Shape) -> dict[str, int]:
    """What the constructors of all kinds call by the same names."""
    return {
        "in_channels": shape.channels,
        "num_layers": shape.double_blocks,
        "attention_head_dim": shape.head_size,
        "num_attention_heads": shape.heads,
        "joint_attention_dim": shape.text_width,
    }


def drawing(transformer: Any) -> "Callable[..., torch.Tensor]":
    """(*sizes) -> normal noise that is the same in every forward."""
    import torch

    is_meta = transformer.device.type == "meta"  # where nothing is drawn
    generator = None if is_meta else torch.Generator(transformer.device).manual_seed(0)
    return partial(torch.randn, generator=generator, device=transformer.device, dtype=transformer.dtype)


def places(count: int, axes: int, device: "torch.device") -> "torch.Tensor":
    """Position ids (count, axes): one column of tokens."""
    import torch

    ids = torch.zeros(count, axes, device=device)
    ids[:, 2] = torch.arange(count, device=device)
    return ids


def joint_flops(shape: Shape, tokens: Tokens, mode: str | None) -> int:
    """FLOPs of a forward where text and image meet in every block, as in FLUX.1 and Qwen-Image.

    Every block costs 24 d^2 a token (q, k, v, out, and an MLP of width 4d) and 4d a pair. Each has a modulation of its
    own: 6d wide for each of the two streams of a double block, and 3d in a single one.
    """
    width, image = shape.width, tokens.output + tokens.references
    blocks = (shape.double_blocks + shape.single_blocks) * (24 * width**2 * tokens.total + 4 * width * tokens.total**2)
    modulation = 2 * width**2 * (6 * 2 * shape.double_blocks + 3 * shape.single_blocks)
    embedded = 2 * width * (shape.channels * image + shape.text_width * tokens.text)
    leaving = 2 * width * shape.channels * image  # the references' tokens as well
    embedding = 2 * width * (256 + width) * (2 if shape.guidance else 1)
    if shape.pooled:
        embedding += 2 * width * (shape.pooled + width)
    return blocks + modulation + embedded + leaving + embedding + 2 * 2 * width**2
