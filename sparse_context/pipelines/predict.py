"""What a call takes before it is made: tokens, floating-point operations, and memory by phase, from shapes alone.

Nothing is loaded and nothing is computed for it: the parts of a pipeline are built on the meta device, and each is run
dry (`dry.DryRun`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig, Qwen3Config, Qwen3ForCausalLM

from ..budget import choose_tokens, is_per_reference
from ..config import SparseContextConfig
from ..families import FAMILIES, Family, family_of
from ..families.shape import Shape, Tokens
from ..selectors.cells import Grid
from .dry import DryRun
from .hub import class_name_of, one_line

PHASES = {"text": "text_encoder", "encode": "vae", "denoise": "transformer", "decode": "vae"}
"""Of a call, and the part that works in each."""

ROOM = 0.95  # of the memory that is there: an allocator wastes some of it, and kernels take some


@dataclass(frozen=True)
class Prediction:
    """What a call takes.

    tokens: what the transformer sees in a forward, `references` being those that are kept. total: those of the whole
    references. flops: of the transformer in all steps, with one forward each. weights: bytes of the parts of the
    pipeline, by name. activations: bytes that tensors take at once beside them, by phase of `PHASES`; a phase that is
    not there, or whose part is not known, is left out. offload: how weights move, as `ModelSpec.cpu_offload`.
    """

    tokens: Tokens
    total: int
    flops: int
    weights: Mapping[str, int]
    activations: Mapping[str, int]
    offload: str | None = None

    @property
    def resident(self) -> int:
        """Bytes of weights that are on the device all the time."""
        return 0 if self.offload else sum(self.weights.values())

    @property
    def peaks(self) -> dict[str, int]:
        """Bytes on the device by phase, weights included."""
        moved = {phase: self.weights.get(part, 0) if self.offload == "model" else 0 for phase, part in PHASES.items()}
        return {phase: self.resident + moved[phase] + taken for phase, taken in self.activations.items()}

    @property
    def peak(self) -> int:
        """The most bytes on the device at once, weights included."""
        return max(self.peaks.values(), default=self.resident)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "tokens": {"text": self.tokens.text, "output": self.tokens.output, "references": self.tokens.references},
            "total": self.total,
            "flops": self.flops,
            "weights": dict(self.weights),
            "activations": dict(self.activations),
            "peaks": self.peaks,
            "peak": self.peak,
        }


@dataclass(frozen=True)
class Parts:
    """A pipeline on the meta device: its modules by name, and how it runs them.

    shape: of the transformer. factor: pixels a side of a latent. weights: bytes by part. kv: whether references go
    through the transformer once. offload: as `ModelSpec.cpu_offload`.
    """

    shape: Shape
    modules: Mapping[str, Any]
    factor: int
    weights: Mapping[str, int]
    kv: bool = False
    offload: str | None = None

    @property
    def takes_frames(self) -> bool:
        """Whether its VAE is one for videos, to which a picture is a single frame."""
        return any(weight.ndim == 5 for weight in self.modules["vae"].parameters())


class Predictor:
    """Predicts calls of one pipeline. Phases that are alike in several calls are run dry once."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self._denoise = lru_cache(maxsize=None)(self._denoise)  # type: ignore[method-assign]
        self._code = lru_cache(maxsize=None)(self._code)  # type: ignore[method-assign]
        self._text = lru_cache(maxsize=None)(self._text)  # type: ignore[method-assign]

    def __call__(
        self, references: Sequence[Grid], keep: float | int, output: Grid, steps: int | None = None
    ) -> Prediction:
        """A call about references with these grids of tokens, of which a share or a count is kept.

        output: its grid. steps: None takes the shape's.
        """
        shape, total = self.parts.shape, sum(rows * columns for rows, columns in references)
        kept = keep if isinstance(keep, int) else max(len(references), round(keep * total))
        tokens = Tokens(shape.text, output[0] * output[1], min(kept, total))
        activations: dict[str, int | None] = {"text": self._text()}
        if references:
            activations["encode"] = self._code("encode", max(references, key=lambda grid: grid[0] * grid[1]))
        peak, flops = self._denoise(tokens, steps or shape.steps)
        activations |= {"denoise": peak, "decode": self._code("decode", output)}
        known = {phase: taken for phase, taken in activations.items() if taken is not None}
        return Prediction(tokens, total, flops, self.parts.weights, known, self.parts.offload)

    def largest_keep(
        self, references: Sequence[Grid], output: Grid, memory: int, steps: int | None = None
    ) -> float | None:
        """The largest share of the tokens of references, in hundredths, with which a call stays within `memory` bytes
        on the device, weights included; None where none does."""
        total = sum(rows * columns for rows, columns in references)

        def peak(hundredths: int) -> int:
            return self(references, max(1, total * hundredths // 100), output, steps).peak

        fits = int(memory * ROOM)
        if peak(1) > fits:
            return None
        low, high = 1, 101  # the first fits, the second does not, or is none
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if peak(middle) <= fits else (low, middle)
        return low / 100

    def encoding(self, grids: Sequence[Grid]) -> int:
        """The most bytes that encoding a prompt or a picture of one of these grids takes beside all weights; of what is
        not known, nothing."""
        largest = max(grids, key=lambda grid: grid[0] * grid[1])
        return max(self._text() or 0, self._code("encode", largest) or 0)

    def _text(self) -> int | None:
        """The one encoder that klein has. Others want pictures too, or are two: their phase stays unknown."""
        encoder, count = self.parts.modules.get("text_encoder"), self.parts.shape.text
        if not isinstance(encoder, Qwen3ForCausalLM):
            return None
        ids = torch.zeros(1, count, dtype=torch.int64, device="meta")
        # The mask that it makes of its host's, ready-made, for making it looks at values
        mask = torch.ones(1, 1, count, count, dtype=torch.bool, device="meta")
        with torch.no_grad(), DryRun() as run:
            encoder(input_ids=ids, attention_mask={"full_attention": mask}, output_hidden_states=True, use_cache=False)
        return run.peak

    def _code(self, phase: str, grid: Grid) -> int | None:
        """Encoding a picture of so many tokens, or decoding one."""
        parts, vae = self.parts, self.parts.modules.get("vae")
        if vae is None:
            return None
        pixels = grid[0] * parts.shape.token, grid[1] * parts.shape.token
        sides = (*(side // parts.factor for side in pixels),) if phase == "decode" else pixels
        channels = 3 if phase == "encode" else (vae.config.z_dim if parts.takes_frames else vae.config.latent_channels)
        size = (1, channels, 1, *sides) if parts.takes_frames else (1, channels, *sides)
        with torch.no_grad(), DryRun() as run:
            made = getattr(vae, phase)(torch.empty(size, dtype=vae.dtype, device="meta"))
            del made
        return run.peak

    def _denoise(self, tokens: Tokens, steps: int) -> tuple[int, int]:
        """Peak bytes, and the operations of all steps."""
        parts = self.parts
        kind, transformer = parts.shape.kind, parts.modules["transformer"]
        with torch.no_grad(), DryRun() as run:
            if not parts.kv or not tokens.references:
                transformer(**kind.arguments(transformer, parts.shape, tokens, None), return_dict=False)
                return run.peak, run.flops * steps
            first = kind.arguments(transformer, parts.shape, tokens, "extract")
            cache = transformer(**first, return_dict=False)[1]
            del first
            before = run.flops
            if steps > 1:
                later = kind.arguments(transformer, parts.shape, tokens, "cached")
                transformer(**later, kv_cache=cache, return_dict=False)
            return run.peak, before + (steps - 1) * (run.flops - before)


def parts_of(pipe: Any, text: int | None = None, offload: str | None = None) -> Parts:
    """The parts of a pipeline that is loaded. text: tokens of its prompts; None: as many as its family has by default.

    Raises ValueError where a part of it is the user's own, of which nobody knows how it is built.
    """
    family = family_of(pipe)
    modules = {
        name: getattr(part, "_orig_mod", part)  # a compiled module takes what the one that was compiled takes
        for name, part in pipe.components.items()
        if isinstance(part, torch.nn.Module)
    }
    twins = {name: _twin(part) for name, part in modules.items() if name in PHASES.values()}
    shape = _shape(family, twins["transformer"], 2 * pipe.vae_scale_factor, text)
    weights = {name: _bytes(part) for name, part in modules.items()}
    return Parts(shape, twins, pipe.vae_scale_factor, weights, family.kv, offload)


def offload_of(pipe: Any) -> str | None:
    """How the weights of a loaded pipeline move, as `ModelSpec.cpu_offload`: "group" also where it is sequential."""
    if getattr(pipe, "_all_hooks", None):  # of `enable_model_cpu_offload`
        return "model"
    registries = [getattr(module, "_diffusers_hook", None) for module in pipe.transformer.modules()]
    in_groups = any(each is not None and each.get_hook("group_offloading") is not None for each in registries)
    return "group" if in_groups or any(weight.is_meta for weight in pipe.transformer.parameters()) else None


def parts_of_model(
    path: str, dtype: torch.dtype, kv: bool = False, offload: str | None = None, text: int | None = None
) -> Parts:
    """The parts of a model by its configs: a folder or a hub id in the diffusers layout, whose weights are not read.

    text: tokens of its prompts; None: as many as its family has by default. Raises ValueError for a model that is no
    plain pipeline.
    """
    class_name = class_name_of(path)
    family = FAMILIES[class_name]
    if family.modular:
        raise ValueError(f"The memory of {path}, a {class_name}, cannot be predicted: name a plain pipeline.")
    try:
        twins = {name: _twin_of_config(path, name, *about, dtype) for name, about in _components(path).items()}
    except Exception as error:  # the readers of configs raise many kinds, and all of them mean this
        raise ValueError(f"The configs of the model {path} do not load: {one_line(error)}.") from error
    for name in ("transformer", "vae"):
        if name not in twins:
            raise ValueError(f"The model {path} is incomplete: it has no {name}.")
    config = twins["vae"].config
    levels = config.temperal_downsample if "temperal_downsample" in config else config.block_out_channels[1:]
    factor = 2 ** len(levels)
    shape = _shape(family, twins["transformer"], 2 * factor, text)
    weights = {name: _bytes(twin) for name, twin in twins.items()}
    return Parts(shape, twins, factor, weights, kv or family.kv, offload)


def parts_of_shape(shape: Shape, dtype: torch.dtype, kv: bool = False, offload: str | None = None) -> Parts:
    """The parts of a shape of the benchmark: all of them of FLUX.2's, of others the transformer alone."""
    from diffusers import AutoencoderKLFlux2

    with torch.device("meta"):
        twins: dict[str, Any] = {"transformer": shape.kind.build(shape)}
        if shape.kind.whole:
            twins["vae"] = AutoencoderKLFlux2()
        if shape.encoder:
            twins["text_encoder"] = Qwen3ForCausalLM(Qwen3Config(**shape.encoder))
    twins = {name: torch.nn.Module.to(twin, dtype).eval() for name, twin in twins.items()}
    weights = {name: _bytes(twin) for name, twin in twins.items()}
    return Parts(shape, twins, shape.token // 2, weights, kv, offload)


def grid_of(width: int, height: int, token: int, area: int | None = None) -> Grid:
    """Rows and columns of a reference of this size. area: pixels that its host scales every one to; None: as it is."""
    scale = 1.0 if area is None else math.sqrt(area / (width * height))
    return max(1, round(height * scale) // token), max(1, round(width * scale) // token)


def kept_of(config: SparseContextConfig, grids: Sequence[Grid]) -> int:
    """How many tokens of references with these grids a config keeps; all for "auto", which the pictures decide."""
    keep = list(config.keep) if is_per_reference(config.keep) else [config.keep]
    sizes = [rows * columns for rows, columns in grids]
    if any(isinstance(ratio, str) for ratio in keep):
        return sum(sizes)
    scores = [np.zeros(grid, np.float32) for grid in grids]
    kept = choose_tokens(
        scores, config.keep, share=config.share, floor=config.floor, multiple_of=config.multiple_of, sizes=sizes
    )
    return sum(map(len, kept))


def _twin_of_config(path: str, name: str, library: str, kind: str, dtype: torch.dtype) -> Any:
    """A part of a model on the meta device, by the config in its folder."""
    import diffusers
    import transformers

    with torch.device("meta"):
        if library == "diffusers":
            cls = getattr(diffusers, kind)
            twin = cls.from_config(cls.load_config(path, subfolder=name))
        else:
            twin = getattr(transformers, kind)(transformers.AutoConfig.from_pretrained(path, subfolder=name))
    return torch.nn.Module.to(twin, dtype).eval()


def _components(path: str) -> dict[str, tuple[str, str]]:
    """The modules of a model that a call runs: library and class by name."""
    from diffusers import DiffusionPipeline

    return {
        name: (about[0], about[1])
        for name, about in DiffusionPipeline.load_config(path).items()
        if name in (*PHASES.values(), "text_encoder_2") and isinstance(about, (list, tuple)) and about[1] is not None
    }


def _shape(family: Family, transformer: Any, token: int, text: int | None) -> Shape:
    bench = import_module(f"..families.{family.folder}.bench", __package__)
    usual = next(iter(bench.SHAPES.values()))
    return bench.shape_of(transformer, token, text or usual.text, usual.steps)


def _twin(module: Any) -> Any:
    """A module of the same class and config on the meta device."""
    config = getattr(module, "config", None)
    with torch.device("meta"):
        if hasattr(type(module), "from_config"):
            twin = type(module).from_config(config)
        elif isinstance(config, PretrainedConfig):
            twin = type(module)(config)
        else:
            raise ValueError(f"What {type(module).__name__} takes cannot be predicted, for it has no config.")
    return torch.nn.Module.to(twin, module.dtype).eval()


def _bytes(module: torch.nn.Module) -> int:
    """Of its weights."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
