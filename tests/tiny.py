"""Tiny real pipelines, built in code, and one way to call them all.

A new family joins the suite of test_families.py by adding one entry to `CASES`.
"""

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, partial
from types import ModuleType

import numpy as np
import pytest
import torch
from accelerate import cpu_offload_with_hook
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    Flux2AutoBlocks,
    Flux2KleinAutoBlocks,
    Flux2KleinBaseAutoBlocks,
    Flux2KleinBaseModularPipeline,
    Flux2KleinInpaintPipeline,
    Flux2KleinKVPipeline,
    Flux2KleinModularPipeline,
    Flux2KleinPipeline,
    Flux2ModularPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    Flux3AutoBlocks,
    Flux3DistilledAutoBlocks,
    Flux3Transformer2DModel,
    FluxKontextInpaintPipeline,
    FluxKontextPipeline,
    FluxTransformer2DModel,
    LongCatImageEditPipeline,
    LongCatImageTransformer2DModel,
    QwenImageEditInpaintPipeline,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageTransformer2DModel,
)
from diffusers.models.transformers import (
    transformer_flux,
    transformer_flux2,
    transformer_flux3,
    transformer_longcat_image,
    transformer_qwenimage,
)
from diffusers.modular_pipelines.flux3.image_processor import Flux3ImageProcessor
from diffusers.pipelines.flux import pipeline_flux_kontext, pipeline_flux_kontext_inpaint
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from diffusers.pipelines.longcat_image import pipeline_longcat_image_edit
from diffusers.pipelines.qwenimage import (
    pipeline_qwenimage_edit,
    pipeline_qwenimage_edit_inpaint,
    pipeline_qwenimage_edit_plus,
)
from PIL import Image
from transformers import (
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from sparse_context import apply_sparse_context

OUTPUT = (64, 64)  # height and width of what is made: 8 x 8 tokens
TOKEN = 8  # pixels a side
TEXT_LENGTH = 12
TEXT_LAYERS = (1, 2)
TEXT_WIDTH = 16
STEPS = 2


SMALLER = 8  # how many times fewer pixels a side the hosts below scale pictures to
_shapes = {host: host.PREFERRED_KONTEXT_RESOLUTIONS for host in (pipeline_flux_kontext, pipeline_flux_kontext_inpaint)}
_dimensions = {
    host: host.calculate_dimensions
    for host in (
        pipeline_longcat_image_edit,
        pipeline_qwenimage_edit,
        pipeline_qwenimage_edit_inpaint,
        pipeline_qwenimage_edit_plus,
    )
}
_small_lock, _small_users = threading.Lock(), 0


def _set_sides(smaller: int) -> None:
    def calculate(original: Callable, *args):
        width, height, *rest = original(*args)
        return width // smaller, height // smaller, *rest

    for host, shapes in _shapes.items():
        host.PREFERRED_KONTEXT_RESOLUTIONS = [(width // smaller, height // smaller) for width, height in shapes]
    for host, original in _dimensions.items():
        host.calculate_dimensions = original if smaller == 1 else partial(calculate, original)


@contextmanager
def small_hosts() -> Iterator[None]:
    """Kontext, LongCat and Qwen scale every picture to about a megapixel. Within this, to one of 128 x 128 pixels.

    Every number that they scale to is a multiple of 16, so with tokens of 8 instead of 64 pixels all grids stay.
    It may be entered again inside, and by several threads.
    """
    global _small_users
    with _small_lock:
        _small_users += 1
        if _small_users == 1:
            _set_sides(SMALLER)
    try:
        yield
    finally:
        with _small_lock:
            _small_users -= 1
            if not _small_users:
                _set_sides(1)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture with smooth colours, hard edges and some noise, so that every selector has something to say."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 / width, y * 255 / height, (x + y) % 97 * 2.0], -1)
    pixels[height // 4 : height // 2, width // 4 : width // 2] = rng.integers(0, 256, 3)
    return Image.fromarray(np.clip(pixels + rng.normal(0, 4, pixels.shape), 0, 255).astype(np.uint8))


def tiny_vae() -> AutoencoderKLFlux2:
    return AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 4, 4),
        layers_per_block=1,
        latent_channels=2,
        norm_num_groups=2,
        sample_size=64,
        mid_block_add_attention=False,
    )


def tiny_transformer(guidance_embeds: bool = False) -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        in_channels=8,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH * len(TEXT_LAYERS),
        axes_dims_rope=(4, 4, 4, 4),
        rope_theta=100,
        timestep_guidance_channels=32,
        guidance_embeds=guidance_embeds,
    )


@cache
def tiny_tokenizer() -> Qwen2Tokenizer:
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(["the cat of image 1 in the room"] * 4, vocab_size=300)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return tokenizer


def tiny_text_encoder() -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tiny_tokenizer()),
            hidden_size=TEXT_WIDTH,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=64,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def built(cls: type, **components):
    """A pipeline of `cls` with random weights, silent, and the same at every call if its parts are."""
    pipe = cls(scheduler=FlowMatchEulerDiscreteScheduler(), **components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def build_flux2(cls: type, **config):
    """A pipeline of `cls` with random weights, the same at every call."""
    torch.manual_seed(0)
    dev = cls is Flux2Pipeline
    return built(
        cls,
        vae=tiny_vae(),
        text_encoder=None if dev else tiny_text_encoder(),
        tokenizer=None if dev else tiny_tokenizer(),
        transformer=tiny_transformer(guidance_embeds=dev),
        **config,
    )


def embeds(batch: int = 1, seed: int = 1, width: int = TEXT_WIDTH * len(TEXT_LAYERS)) -> torch.Tensor:
    return torch.randn(batch, TEXT_LENGTH, width, generator=torch.Generator().manual_seed(seed))


def pooled(batch: int = 1, seed: int = 1) -> torch.Tensor:
    return embeds(batch, seed, TEXT_WIDTH)[:, 0]


def run(pipe, **kwargs) -> torch.Tensor:
    """Latents of a short call with a fixed seed."""
    kwargs.setdefault("generator", torch.Generator().manual_seed(7))
    kwargs.setdefault("output_type", "latent")
    return pipe(num_inference_steps=STEPS, **kwargs).images


def middle(size: tuple[int, int]) -> Image.Image:
    """An inpainting mask over the middle of a picture."""
    width, height = size[0] // 4, size[1] // 4
    return Image.fromarray(np.pad(np.full((2 * height, 2 * width), 255, np.uint8), ((height,), (width,))))


def call_flux2(pipe, references: list, prompts: int = 1, **kwargs) -> torch.Tensor:
    """Latents of a call. References in order; kwargs go to the pipeline."""
    if hasattr(type(pipe), "do_classifier_free_guidance"):
        kwargs.setdefault("guidance_scale", 1.0)
    height, width = OUTPUT
    return run(pipe, prompt_embeds=embeds(prompts), image=references or None, height=height, width=width, **kwargs)


def call_flux2_inpaint(pipe, references: list, prompts: int = 1, **kwargs) -> torch.Tensor:
    """The first reference is the source, the others go to `image_reference`."""
    kwargs.setdefault("guidance_scale", 1.0)
    source, *rest = references
    return run(
        pipe,
        prompt_embeds=embeds(prompts),
        image=source,
        mask_image=middle(source.size),
        strength=1.0,
        image_reference=(rest if len(rest) > 1 else rest[0]) if rest else None,
        **kwargs,
    )


def flux1_vae(levels: int = 3, latent_channels: int = 2) -> AutoencoderKL:
    """A token is 2**levels pixels wide."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(4,) * levels,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=2,
        sample_size=64,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.1,
        scaling_factor=0.4,
    )


def build_kontext(cls: type, levels: int = 3):
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=8,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    no_text = dict.fromkeys(["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"])
    return built(cls, vae=flux1_vae(levels), transformer=transformer, **no_text)


@small_hosts()
def call_kontext(pipe, references: list, prompts: int = 1, **kwargs) -> torch.Tensor:
    """With the reference and the output at the host's default size, of `small_hosts`."""
    prompts *= kwargs.pop("num_images_per_prompt", 1)  # the host repeats prompts, and fails to repeat embeddings
    kwargs.setdefault("max_area", 1024**2 // SMALLER**2)
    kwargs.setdefault("image", references[0] if references else None)
    return run(pipe, prompt_embeds=embeds(prompts, width=TEXT_WIDTH), pooled_prompt_embeds=pooled(prompts), **kwargs)


def call_kontext_source(pipe, references: list, prompts: int = 1, **kwargs) -> torch.Tensor:
    """The inpainting source is its own reference, here in its own size."""
    kwargs = {
        "mask_image": middle(references[0].size),
        "_auto_resize": False,
        "max_area": OUTPUT[0] * OUTPUT[1],
        "height": OUTPUT[0],
        "width": OUTPUT[1],
        **kwargs,
    }
    return call_kontext(pipe, references, prompts, **kwargs)


def kontext_grid(image: Image.Image) -> tuple[int, int]:
    """Tokens in a picture that goes to the nearest of Kontext's shapes, by its sides in whole tokens."""
    aspect = (image.width // TOKEN) / (image.height // TOKEN)
    shapes = _shapes[pipeline_flux_kontext]
    width, height = min(shapes, key=lambda shape: abs(shape[0] / shape[1] - aspect))
    return height // SMALLER // TOKEN, width // SMALLER // TOKEN


def call_kontext_inpaint(pipe, references: list, prompts: int = 1, **kwargs) -> torch.Tensor:
    """The reference goes to `image_reference`, the source is another picture."""
    source = picture(64, 64, seed=9)
    return call_kontext_source(pipe, [source], prompts, image_reference=references[0], **kwargs)


KONTEXT_GUIDANCE = {
    "true_cfg_scale": 4.0,
    "negative_prompt_embeds": embeds(seed=2, width=TEXT_WIDTH),
    "negative_pooled_prompt_embeds": pooled(seed=2),
}


class VisionProcessor(ProcessorMixin):
    """As much of Qwen's processor as LongCat uses; the whole one does not build without torchvision."""

    def __init__(self, image_processor):
        super().__init__(image_processor)


def vision_processor() -> Qwen2VLImageProcessorPil:
    try:
        return Qwen2VLImageProcessorPil(max_pixels=56 * 56)
    except ImportError:  # so transformers 5.4
        pytest.skip("this version of transformers builds Qwen's image processor with torchvision only")


VISION_TOKENS = {
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
}


def build_longcat(levels: int = 6):
    """With its text encoder, because this pipeline takes no prompt embeddings, whatever its signature says."""
    torch.manual_seed(0)
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(["Make the cat blue. 0123456789"], vocab_size=300)
    tokenizer.add_tokens([*VISION_TOKENS.values(), "<|im_start|>", "<|im_end|>"], special_tokens=True)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 100.0}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "bos_token_id": None,
        "eos_token_id": None,
        "rope_parameters": rope,
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": TEXT_WIDTH,
        "fullatt_block_indexes": [0],
    }
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in VISION_TOKENS.items()}
    transformer = LongCatImageTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=[4, 4, 8],
    )
    return built(
        LongCatImageEditPipeline,
        vae=flux1_vae(levels, latent_channels=16),
        text_encoder=Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
        ),
        tokenizer=tokenizer,
        text_processor=VisionProcessor(vision_processor()),
        transformer=transformer,
    )


@small_hosts()
def call_longcat(pipe, references: list, prompts: int = 1, **kwargs) -> torch.Tensor:
    kwargs.setdefault("guidance_scale", 1.0)
    return run(pipe, image=references[0], prompt=["blue cat"] * prompts, **kwargs)


def build_qwen(cls: type, zero_cond_t: bool = False, levels: int = 6):
    """A token is 2**levels pixels wide: 64 for references that are scaled to a megapixel."""
    torch.manual_seed(0)
    # These random weights flatten pictures; so they are brought back to unit spread
    mean, std = {3: ([0.13, -0.39], [0.04, 0.05]), 6: ([-0.56, 0.08], [0.04, 0.03])}[levels]
    vae = AutoencoderKLQwenImage(
        base_dim=2,
        z_dim=2,
        dim_mult=[1] * levels,
        num_res_blocks=0,
        temperal_downsample=[False] * (levels - 1),
        latents_mean=mean,
        latents_std=std,
    )
    transformer = QwenImageTransformer2DModel(
        in_channels=8,
        out_channels=2,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 4, 8),
        zero_cond_t=zero_cond_t,
    )
    no_text = dict.fromkeys(["text_encoder", "tokenizer", "processor"])
    return built(cls, vae=vae, transformer=transformer, **no_text)


@small_hosts()
def call_qwen(pipe, references: list, prompts: int = 1, **kwargs) -> torch.Tensor:
    kwargs = {"true_cfg_scale": 1.0, "height": OUTPUT[0], "width": OUTPUT[1], **kwargs}
    image = references if len(references) > 1 else references[0]
    return run(pipe, image=image, prompt_embeds=embeds(prompts, width=TEXT_WIDTH), **kwargs)


def call_qwen_inpaint(pipe, references: list, prompts: int = 1, **kwargs) -> torch.Tensor:
    """The source is the reference."""
    mask_image = middle(references[0].size)
    return call_qwen(pipe, references, prompts, mask_image=mask_image, strength=1.0, **kwargs)


def megapixel_grid(image: Image.Image, rounded: Callable) -> tuple[int, int]:
    """Whole tokens in a picture that is scaled to a megapixel, then to `rounded` sides, and by `small_hosts`."""
    width = (1024 * 1024 * image.width / image.height) ** 0.5
    return tuple(rounded(side) // SMALLER // TOKEN for side in (width * image.height / image.width, width))


def build_flux3(blocks: type):
    """Without the blocks before the prompt embeddings and behind the latents."""
    torch.manual_seed(0)
    blocks = blocks()
    for name in ("prompt_upsampler", "text_encoder", "decode"):
        blocks.sub_blocks.pop(name)
    pipe = blocks.init_pipeline()
    distilled = isinstance(blocks, Flux3DistilledAutoBlocks)
    transformer = Flux3Transformer2DModel(
        in_channels=8,
        cond_in_channels=8,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        timestep_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        rope_theta=100,
        flow_map=distilled,
    )
    image_processor = Flux3ImageProcessor(vae_scale_factor=TOKEN, vae_latent_channels=2)
    pipe.update_components(vae=tiny_vae(), transformer=transformer, image_processor=image_processor)
    if not distilled:
        pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=1.0))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_modular(
    pipe,
    references: list,
    prompts: int = 1,
    guidance_scale: float | None = None,
    text_width: int = TEXT_WIDTH,
    **kwargs,
) -> torch.Tensor:
    if guidance_scale is not None:
        pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=guidance_scale))
    kwargs = {"generator": torch.Generator().manual_seed(7), "height": OUTPUT[0], "width": OUTPUT[1], **kwargs}
    images = {"image": references} if references else {}
    return pipe(
        prompt_embeds=embeds(prompts, width=text_width), num_inference_steps=STEPS, output="latents", **images, **kwargs
    )


def build_flux2_modular(blocks, cls: type = Flux2KleinModularPipeline):
    """A pipeline of these blocks with the parts of `build_flux2`, from the prompt embeddings to the latents."""
    torch.manual_seed(0)
    blocks = deepcopy(blocks)
    for name in ("text_encoder", "decode"):
        blocks.sub_blocks.pop(name)
    pipe = cls(blocks=blocks)
    pipe.update_components(
        vae=tiny_vae(),
        transformer=tiny_transformer(guidance_embeds=cls is Flux2ModularPipeline),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        image_processor=Flux2ImageProcessor(vae_scale_factor=TOKEN, vae_latent_channels=2),
    )
    if "guider" in pipe.components:
        pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=1.0))
    pipe.set_progress_bar_config(disable=True)
    return pipe


call_flux2_modular = partial(call_modular, text_width=TEXT_WIDTH * len(TEXT_LAYERS))


def share_modular(pipe):
    """Another pipeline with the same components."""
    twin = pipe.blocks.init_pipeline()
    twin.update_components(**pipe.components)
    return twin


def offload_modular(pipe) -> None:
    """With the hooks that diffusers' other pipelines set; the modular manager's own need an accelerator."""
    for model in (pipe.vae, pipe.transformer):
        cpu_offload_with_hook(model, "cpu")


# How the tests look into a transformer --------------------------------------------------------------------------------


def watch_inputs(transformer, seen: list) -> None:
    """Fills `seen` with (image tokens, their position ids (B or 1, N, A)) of each forward."""

    def record(module, args, kwargs):
        ids = kwargs["img_ids"].clone()
        seen.append((kwargs["hidden_states"].shape[1], ids if ids.ndim == 3 else ids[None]))

    transformer.register_forward_pre_hook(record, with_kwargs=True)


def watch_blocks(transformer, seen: list) -> None:
    """The same for a transformer that has rotary rows in the place of position ids."""

    def record(block, args, kwargs):
        seen.append((kwargs["hidden_states"].shape[1], kwargs["image_rotary_emb"][0][None].clone()))

    transformer.transformer_blocks[0].register_forward_pre_hook(record, with_kwargs=True)


def watch_flux3(transformer, seen: list) -> None:
    """The same where references arrive beside the image tokens."""

    def record(module, args, kwargs):
        parts = [(kwargs["hidden_states"], kwargs["img_ids"])]
        if kwargs.get("image_cond_ids") is not None:
            parts.append((kwargs["image_cond_hidden_states"], kwargs["image_cond_ids"]))
        tokens, ids = zip(*parts, strict=True)
        seen.append((sum(t.shape[1] for t in tokens), torch.cat(ids)[None]))

    transformer.register_forward_pre_hook(record, with_kwargs=True)


def references_last(length: int, references: int) -> int:
    """The place of the first of the references' tokens among `length` keys, in a (text, output, references) block."""
    return length - references


def references_first(length: int, references: int) -> int:
    """In a (text, references, output) block, or one that sees the references alone."""
    return 0 if length == references else TEXT_LENGTH


def references_last_or_alone(length: int, references: int) -> int | None:
    """In a (text, output, references) block, or one that sees the text, the output or the references alone."""
    return length - references if length >= references else None


def flux2_overview_ids(whole: list, grids: list, factor: int, layout: str) -> torch.Tensor:
    """The position ids of all overviews in FLUX.2, whose references lie at T = 10, 20 ..."""
    ids = []
    for i, (rows, columns) in enumerate(grids):
        row, column = torch.arange(math.ceil(rows / factor)), torch.arange(math.ceil(columns / factor))
        at = 10 * (i + 1) + math.log2(factor), factor, (factor - 1) / 2
        scale, step, first = at if layout == "spread" else (10 * (len(grids) + i + 1), 1, 0)
        places = torch.cartesian_prod(row * step + first, column * step + first).float()
        ids.append(torch.nn.functional.pad(places, (1, 1)) + torch.tensor([scale, 0, 0, 0]))
    return torch.cat(ids)


def kontext_overview_ids(whole: list, grids: list, factor: int, layout: str) -> torch.Tensor:
    """In Kontext and LongCat: over the only reference, or below it (to the right of a tall one)."""
    ((rows, columns),) = grids
    where, row, column = whole[0][0].float()  # of its first token
    coarse_rows, coarse_columns = torch.arange(math.ceil(rows / factor)), torch.arange(math.ceil(columns / factor))
    if layout == "spread":
        middle = (factor - 1) / 2
        where, coarse_rows = where + 0.5 * math.log2(factor), coarse_rows * factor + middle
        coarse_columns = coarse_columns * factor + middle
    elif rows > columns:
        coarse_columns = columns + coarse_columns
    else:
        coarse_rows = rows + coarse_rows
    return torch.cartesian_prod(where[None], row + coarse_rows, column + coarse_columns)


def flux3_overview_ids(whole: list, grids: list, factor: int, layout: str) -> torch.Tensor:
    """In FLUX.3, whose references lie at L = -1, -2 ..., half a place from row to row and column to column."""
    ids = []
    for i, (rows, columns) in enumerate(grids):
        row, column = torch.arange(math.ceil(rows / factor)), torch.arange(math.ceil(columns / factor))
        at = math.log2(factor), factor, (factor - 1) / 2, -(i + 1)
        time, step, first, last = at if layout == "spread" else (0, 1, 0, -(len(grids) + i + 1))
        places = 0.5 * torch.cartesian_prod(row * step + first, column * step + first).float()
        ids.append(torch.nn.functional.pad(places, (1, 1)) + torch.tensor([time, 0, 0, last]))
    return torch.cat(ids)


def qwen_overview_ids(whole: list, grids: list, factor: int, layout: str) -> torch.Tensor:
    """The rotary rows in Qwen: at the cell nearest to the middle, at a frame some places behind the reference's."""
    ids = []
    for i, (rows, columns) in enumerate(grids):
        row, column = torch.arange(math.ceil(rows / factor)), torch.arange(math.ceil(columns / factor))
        frame = len(grids) + i + 1
        if layout == "spread":
            frame = i + 1 + max(4, len(grids)) * round(math.log2(factor))
            row = torch.minimum(row * factor + (factor - 1) // 2, torch.tensor(rows - 1))
            column = torch.minimum(column * factor + (factor - 1) // 2, torch.tensor(columns - 1))
        else:
            rows, columns = len(row), len(column)
        places = torch.cartesian_prod(
            torch.tensor([frame]), row - (rows - rows // 2), column - (columns - columns // 2)
        )
        ids.append(torch.cat([qwen_rows(places[:, axis], dim) for axis, dim in enumerate((4, 4, 8))], dim=1))
    return torch.cat(ids)


def qwen_rows(places: torch.Tensor, dim: int) -> torch.Tensor:
    """Of one axis: the host makes a table of them, and another order of its sums would be another result."""
    frequencies = 1 / 10000 ** (torch.arange(0, dim, 2) / dim)
    angles = torch.outer(torch.arange(4096), frequencies)
    rows = torch.polar(torch.ones_like(angles), angles)[places.abs()]
    return torch.where(places[:, None] < 0, rows.conj(), rows)


@dataclass(frozen=True, eq=False)  # each case is a key of its answers below
class Case:
    """One kind of pipeline.

    attention: the module in which its transformer calls `dispatch_attention_fn`.
    sizes: (width, height) of the references to try.
    counts: how many of them a call is tried with. usual: how many in most tests, if the host takes that many.
    prompts: how many prompts a call takes.
    grid: the token grid (rows, columns) that a reference has after the host's resize and crop.
    first_key: the place of the first of the references' keys in a block; None in a block that sees none of them.
    references_first: whether the transformer sees them before the output's tokens.
    without_references: whether a call can do without any.
    guidance: what makes a call take a second forward; None where nothing does.
    watch: fills a list with what each forward of the transformer saw, see `watch_inputs`.
    overview_ids: from what `watch` saw of each whole reference (N, A), and their grids, factor and layout, to what it
        is to see of their overviews, one after another; None where the family takes no overviews.
    layouts: of these.
    share: another pipeline with the same components. offload: switches the host's CPU offload on.
    """

    build: Callable
    call: Callable
    attention: ModuleType = transformer_flux2
    sizes: tuple[tuple[int, int], ...] = ((64, 64), (96, 64), (64, 120))
    counts: tuple[int, ...] = (1, 2, 3)
    usual: int = 3
    prompts: int = 2
    grid: Callable = lambda image: (image.height // TOKEN, image.width // TOKEN)
    first_key: Callable = references_last
    references_first: bool = False
    without_references: bool = True
    guidance: dict | None = None
    watch: Callable = watch_inputs
    overview_ids: Callable | None = None
    layouts: tuple[str, ...] = ("spread", "reference")
    share: Callable = lambda pipe: type(pipe).from_pipe(pipe)
    offload: Callable = lambda pipe: pipe.enable_model_cpu_offload(device="cpu")

    def references(self, count: int | None = None) -> list[Image.Image]:
        count = min(self.usual if count is None else count, max(self.counts))
        return [picture(*self.sizes[i % len(self.sizes)], seed=i) for i in range(count)]

    def tokens(self, references: list) -> list[int]:
        return [rows * columns for rows, columns in map(self.grid, references)]


FLUX2_GUIDANCE = {"guidance_scale": 4.0, "negative_prompt_embeds": embeds(seed=2)}
kontext = partial(
    Case,
    attention=transformer_flux,
    sizes=((96, 64),),
    counts=(1,),
    guidance=KONTEXT_GUIDANCE,
    overview_ids=kontext_overview_ids,
)
qwen = partial(
    Case,
    attention=transformer_qwenimage,
    sizes=((96, 64),),
    counts=(1,),
    watch=watch_blocks,
    without_references=False,
    grid=lambda image: megapixel_grid(image, lambda side: round(side / 32) * 32),
    guidance={"true_cfg_scale": 4.0, "negative_prompt_embeds": embeds(seed=2, width=TEXT_WIDTH)},
    overview_ids=qwen_overview_ids,
)
qwen_plus = partial(
    qwen, call=call_qwen, sizes=((96, 64), (64, 64), (64, 128), (100, 90)), counts=(1, 2, 4), usual=2, prompts=1
)
flux2 = partial(Case, overview_ids=flux2_overview_ids)
flux2_modular = partial(flux2, call=call_flux2_modular, share=share_modular, offload=offload_modular)
flux3 = partial(
    Case,
    call=call_modular,
    attention=transformer_flux3,
    first_key=references_last_or_alone,
    watch=watch_flux3,
    overview_ids=flux3_overview_ids,
    share=share_modular,
    offload=offload_modular,
)

CASES = {
    "flux2-dev": flux2(lambda: build_flux2(Flux2Pipeline), call_flux2),
    "klein": flux2(lambda: build_flux2(Flux2KleinPipeline), call_flux2, guidance=FLUX2_GUIDANCE),
    "klein-kv": flux2(
        lambda: build_flux2(Flux2KleinKVPipeline), call_flux2, references_first=True, first_key=references_first
    ),
    # Several reference pictures of an inpainting call have one size
    "klein-inpaint": flux2(
        lambda: build_flux2(Flux2KleinInpaintPipeline),
        call_flux2_inpaint,
        sizes=((64, 64), (96, 72), (96, 72)),
        without_references=False,
        guidance=FLUX2_GUIDANCE,
    ),
    "flux2-modular": flux2_modular(lambda: build_flux2_modular(Flux2AutoBlocks(), Flux2ModularPipeline)),
    "klein-modular": flux2_modular(lambda: build_flux2_modular(Flux2KleinAutoBlocks())),
    "klein-base-modular": flux2_modular(
        lambda: build_flux2_modular(Flux2KleinBaseAutoBlocks(), Flux2KleinBaseModularPipeline),
        guidance=FLUX2_GUIDANCE,
    ),
    "flux3": flux3(
        lambda: build_flux3(Flux3AutoBlocks),
        guidance={"guidance_scale": 4.0, "negative_prompt_embeds": embeds(seed=2, width=TEXT_WIDTH)},
    ),
    "flux3-distilled": flux3(lambda: build_flux3(Flux3DistilledAutoBlocks)),
    "kontext": kontext(lambda: build_kontext(FluxKontextPipeline), call_kontext, grid=kontext_grid),
    "kontext-inpaint": kontext(
        lambda: build_kontext(FluxKontextInpaintPipeline), call_kontext_inpaint, without_references=False
    ),
    "kontext-inpaint-source": kontext(
        lambda: build_kontext(FluxKontextInpaintPipeline), call_kontext_source, without_references=False
    ),
    "longcat": Case(
        lambda: build_longcat(levels=3),
        call_longcat,
        transformer_longcat_image,
        sizes=((96, 64),),
        counts=(1,),
        prompts=1,
        grid=lambda image: megapixel_grid(image, lambda side: math.ceil(side / 16) * 16),
        without_references=False,
        guidance={"guidance_scale": 4.0},
        overview_ids=kontext_overview_ids,
    ),
    "qwen-edit": qwen(lambda: build_qwen(QwenImageEditPipeline, levels=3), call_qwen),
    "qwen-edit-inpaint": qwen(lambda: build_qwen(QwenImageEditInpaintPipeline, levels=3), call_qwen_inpaint),
    "qwen-edit-2509": qwen_plus(lambda: build_qwen(QwenImageEditPlusPipeline, levels=3)),
    "qwen-edit-2511": qwen_plus(lambda: build_qwen(QwenImageEditPlusPipeline, zero_cond_t=True, levels=3)),
}

QUICK = "detail"  # a selector without a net

# One case of each way in which reference tokens enter a pipeline, and what paints into its first reference: there the
# pixels come by another way.
EACH_FAMILY = ("klein", "klein-kv", "klein-modular", "flux3", "kontext", "longcat", "qwen-edit-2511")
PAINTING = ("klein-inpaint", "kontext-inpaint", "kontext-inpaint-source", "qwen-edit-inpaint")


WITH_OVERVIEWS = tuple(name for name, case in CASES.items() if case.overview_ids)


def cases(*names: str) -> list:
    """Parameters of a test, every case by default; the tests of a case go to one worker, which has its answers."""
    return [pytest.param(name, id=name, marks=pytest.mark.xdist_group(name=name)) for name in names or CASES]


@cache
def dense_answer(case: Case) -> torch.Tensor:
    """What the untouched pipeline makes of its references: once in a process, so nobody writes to it."""
    return case.call(case.build(), case.references())


@cache
def sparse_answer(case: Case, keep: float) -> torch.Tensor:
    """The same with Sparse Context, by a quick selector: most of a call's time is the net of the default."""
    pipe = case.build()
    apply_sparse_context(pipe, keep=keep, selector=QUICK)
    return case.call(pipe, case.references())
