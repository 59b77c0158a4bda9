"""Which pipeline, and what it is asked for: the two records that every face is built on."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image

from ..config import SparseContextConfig
from .lora_file import NO_LORA, OVERVIEW_LORA, check_lora_scale
from .settings import check_call, check_text

DTYPE_NAMES = ("float16", "fp16", "bfloat16", "bf16", "float32", "fp32")
OFFLOADS = ("model", "group")
QUANTIZATIONS = ("int8", "nf4", "int8-bnb")
VAES = ("channels-last", "compiled")


@dataclass(frozen=True)
class ModelSpec:
    """Which pipeline to load, and how. Raises ValueError for a value that no pipeline takes; nothing is loaded yet.

    model: a hub id or a folder in the diffusers layout; None is the embedded model.
    dtype: a name of `DTYPE_NAMES`, or "auto": float32 for the embedded model on a CPU, else bfloat16.
    device: a torch device; None takes an accelerator if there is one. cpu_offload: "model" or "group".
    lora: a safetensors file for this model, under any of the common names (lora.py), or "none". None is the same as
        "none", except that the embedded model then has its own adapter, for dropped tokens, folded into its weights.
        "overview" are the embedded model's weights for overviews: that adapter, and four blocks more that read them. An
        `Engine` takes them by itself for requests that name an overview.
    lora_scale: how much of the LoRA's change of the weights to take, 0 or more; 1 takes all of it. Another value than 1
        without a LoRA is refused when the model is loaded.
    kv: run a klein model as `Flux2KleinKVPipeline`, for a LoRA that was trained for it (`train --kv`). The embedded
        model then has its adapter for KV mode. Other pipelines, and klein models that need guidance, are refused.
    quantization: how the transformer's weights are stored. "int8": torchao, on any device. "nf4": bitsandbytes, on a
        GPU or a CPU. "int8-bnb": bitsandbytes, on a GPU. The path of a `.gguf` file: the transformer is read from that
        file, everything else from the model. The other parts of the pipeline keep `dtype`. Each needs a package of
        `sparse-context[quantization]`.
    vae: how the VAE runs; its latents then differ in their last digits. "channels-last": with weights in the order in
        which convolutions read pixels. "compiled": that, and by `torch.compile`, which needs a C++ compiler and takes
        its time at the first call of each size. None: as it is loaded.
    """

    model: str | None = None
    dtype: str = "auto"
    device: str | None = None
    cpu_offload: str | None = None
    lora: str | None = None
    lora_scale: float = 1.0
    kv: bool = False
    quantization: str | None = None
    vae: str | None = None

    def __post_init__(self) -> None:
        if self.dtype != "auto" and self.dtype not in DTYPE_NAMES:
            raise ValueError(f"dtype is {self.dtype!r}: choose auto, {', '.join(DTYPE_NAMES)}.")
        if self.cpu_offload is not None and self.cpu_offload not in OFFLOADS:
            raise ValueError(f"cpu_offload is {self.cpu_offload!r}: choose {' or '.join(OFFLOADS)}.")
        check_lora_scale(self.lora_scale)
        file = self.gguf
        if self.quantization is not None and self.quantization not in QUANTIZATIONS and file is None:
            raise ValueError(
                f"quantization is {self.quantization!r}: choose {', '.join(QUANTIZATIONS)} or name a .gguf file."
            )
        if self.vae is not None and self.vae not in VAES:
            raise ValueError(f"vae is {self.vae!r}: choose {' or '.join(VAES)}.")
        if self.vae == "compiled" and self.cpu_offload is not None:
            raise ValueError(f"vae is 'compiled', which cpu_offload {self.cpu_offload!r} cannot move: leave one out.")
        if file is not None and not file.is_file():
            raise ValueError(f"The GGUF file {file} is not there: name one that holds the model's transformer.")

    def with_whole_paths(self) -> "ModelSpec":
        """The same, with absolute paths of the files and folders that it names, for a process in another folder: a
        relative one could be taken for a hub id there."""
        lora = self.lora if self.lora in (NO_LORA, OVERVIEW_LORA) else _whole(self.lora)
        quantization = self.quantization if self.gguf is None else _whole(self.quantization)
        return replace(self, model=_whole(self.model), lora=lora, quantization=quantization)

    @property
    def gguf(self) -> Path | None:
        """The GGUF file of the transformer, where `quantization` names one."""
        is_file = self.quantization is not None and self.quantization.lower().endswith(".gguf")
        return Path(str(self.quantization)) if is_file else None


def with_whole_paths(config: SparseContextConfig) -> SparseContextConfig:
    """The same config, with the absolute path of the model that finds phrases, where it is a folder."""
    return replace(config, text_model=_whole(config.text_model))


def _whole(path: str | None) -> str | None:
    return str(Path(path).absolute()) if path and Path(path).exists() else path


@dataclass(frozen=True)
class Request:
    """What to generate. Raises ValueError for a value that no model takes, before one is loaded.

    prompt: what to make of the references. references: RGB or RGBA images, in order. config: which of their tokens to
    keep. seed: of the image noise. steps, height, width (pixels), guidance_scale: None takes the model's.
    negative_prompt: what to stay away from, for a model with guidance.
    inpaint: for a pipeline that paints into its first reference, a mask (mode L) of its size, white where to paint.
    """

    prompt: str
    references: Sequence[Image.Image] = ()
    config: SparseContextConfig = field(default_factory=SparseContextConfig)
    seed: int = 0
    steps: int | None = None
    height: int | None = None
    width: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    inpaint: Image.Image | None = None

    def __post_init__(self) -> None:
        check_call(self.prompt, self.seed, self.steps, self.height, self.width, self.guidance_scale)
        check_text("negative_prompt", self.negative_prompt or "")
        object.__setattr__(self, "references", tuple(self.references))
