"""The shapes of the real models, so that their time can be measured without their weights.

Time and memory depend on shapes alone; what comes out of random weights means nothing. Sources: the configs published
with each model (black-forest-labs/FLUX.2-klein-4B, FLUX.2-klein-9B, FLUX.2-dev; Qwen/Qwen3-4B, Qwen/Qwen3-8B), and the
defaults of diffusers' `Flux2Transformer2DModel` and `AutoencoderKLFlux2`, which are those of FLUX.2-dev. The others are
the defaults of `FluxTransformer2DModel`, `LongCatImageTransformer2DModel`, `QwenImageTransformer2DModel` and
`Flux3Transformer2DModel`, with the steps and the length of the prompt that their pipelines use, but for what follows.

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

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch  # not at run time: the command reads the names for its help, and has to be instant there


@dataclass(frozen=True)
class Shape:
    """A transformer, and what it runs with.

    `text_width` is that of the prompt's embeddings: in FLUX.2, three layers of the text encoder side by side.
    `double_blocks` are FLUX.3's per-mode ones, `single_blocks` its joint ones. `channels` of a token. `token` pixels a
    side, `text` tokens of the prompt, and `steps` that the model is called with. `encoder` has the sizes of its text
    encoder, a Qwen3, or is empty where this project does not build it. `guidance`: whether the guidance scale, or in
    FLUX.3 the timestep that a step goes to, is embedded like a timestep. `kind` names the entry in `KINDS` of kinds.py.
    `pooled` is the width of the pooled prompt that FLUX.1 has beside the other; 0 for none.
    """

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
    kind: str = "flux2"
    pooled: int = 0

    @property
    def width(self) -> int:
        return self.heads * self.head_size


_QWEN3 = {"num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
          "vocab_size": 151_936}  # fmt: skip

SHAPES: Mapping[str, Shape] = {
    "klein-4b": Shape(24, 5, 20, 7_680, _QWEN3 | {"hidden_size": 2_560, "intermediate_size": 9_728}),
    "klein-9b": Shape(32, 8, 24, 12_288, _QWEN3 | {"hidden_size": 4_096, "intermediate_size": 12_288}),
    "flux2-dev": Shape(48, 8, 48, 15_360, {}, steps=28, guidance=True),
    "kontext": Shape(24, 19, 38, 4_096, {}, steps=28, guidance=True, channels=64, kind="flux", pooled=768),
    "longcat-edit": Shape(24, 10, 20, 3_584, {}, steps=50, channels=64, text=512 + 18 * 18, kind="longcat"),
    "qwen-edit": Shape(24, 60, 0, 3_584, {}, steps=50, channels=64, kind="qwen_image"),
    "flux3-klein": Shape(24, 5, 28, 20_480, {}, steps=16, guidance=True, text=560, kind="flux3"),
}


def shape_of(transformer: Any, token: int, text: int, steps: int) -> Shape:
    """The shape of a `Flux2Transformer2DModel`, called with tokens `token` pixels wide and `text` of the prompt."""
    config = transformer.config
    return Shape(
        heads=config.num_attention_heads,
        double_blocks=config.num_layers,
        single_blocks=config.num_single_layers,
        text_width=config.joint_attention_dim,
        encoder={},
        steps=steps,
        guidance=config.guidance_embeds,
        head_size=config.attention_head_dim,
        channels=config.in_channels,
        token=token,
        text=text,
    )


def find_shape(name: str) -> Shape:
    """The shape called `name`. Raises ValueError that names all."""
    if name not in SHAPES:
        raise ValueError(f"random-weights is {name!r}: choose {', '.join(SHAPES)}.")
    return SHAPES[name]


def with_blocks(shape: Shape, blocks: int) -> Shape:
    """The shape with `blocks` of each kind of block that it has, in place of all."""
    return replace(shape, double_blocks=blocks, single_blocks=blocks if shape.single_blocks else 0)


def build_transformer(
    shape: Shape, device: "torch.device", dtype: "torch.dtype", blocks: int | None = None
) -> "torch.nn.Module":
    """A transformer of this shape with random weights, drawn on the device; `blocks` of each kind in place of all."""
    import torch

    from .kinds import KINDS

    with torch.device("meta"):
        transformer = KINDS[shape.kind].build(shape if blocks is None else with_blocks(shape, blocks))
    return draw_weights(transformer, device, dtype)


def build_pipeline(shape: Shape, device: "torch.device", dtype: "torch.dtype") -> Any:
    """A pipeline of this shape, which is FLUX.2's, with random weights.

    Without an `encoder` it has no text encoder: pass `prompt_embeds`. Its tokeniser is the embedded model's, filled up
    to the same number of tokens.
    """
    import torch
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Pipeline
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    from ..mini import WEIGHTS

    with torch.device("meta"):
        vae = AutoencoderKLFlux2()
        encoder = Qwen3ForCausalLM(Qwen3Config(**shape.encoder)) if shape.encoder else None
    parts = {
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "vae": draw_weights(vae, device, dtype).eval(),
        "text_encoder": None if encoder is None else draw_weights(encoder, device, dtype).eval(),
        "tokenizer": AutoTokenizer.from_pretrained(WEIGHTS / "tokenizer") if shape.encoder else None,
        "transformer": build_transformer(shape, device, dtype).eval(),
    }
    return Flux2Pipeline(**parts) if shape.guidance else Flux2KleinPipeline(**parts, is_distilled=True)


def draw_weights(module: "torch.nn.Module", device: "torch.device", dtype: "torch.dtype") -> "torch.nn.Module":
    """Give a module on the meta device real weights: matrices from N(0, 0.02), norms 1, biases and statistics 0 and 1.

    Nothing passes through the CPU, and there is never a second copy. What diffusers keeps in float32, stays in it.
    """
    import torch

    rotary = {name for name, _ in module.named_buffers() if name.endswith("inv_freq")}
    torch.nn.Module.to(module, dtype)  # not diffusers' own, which warns of weights that nobody has drawn yet
    exact = getattr(module, "_keep_in_fp32_modules", None) or ()
    for name, part in module.named_modules():
        if name.rpartition(".")[2] in exact:
            part.float()
    module.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.02, generator=generator)
            else:
                weight.fill_(0.0 if name.endswith("bias") else 1.0)
        for name, buffer in module.named_buffers():
            buffer.fill_(1 if name in rotary or name.endswith("running_var") else 0)
    return module
