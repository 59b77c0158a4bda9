"""References and a prompt in, a picture out: what the faces (command line, app, server) call.

Bad input raises ValueError (or one of its kinds) with one sentence that says what is wrong and what to do.
"""

import inspect
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .families import FAMILIES
from .mini import WEIGHTS, read_call_settings
from .selection import Selection, SparseContextConfig
from .speed.timing import Times, timed
from .sparsify import apply_sparse_context, last_selection

DTYPES = {"float16": torch.float16, "fp16": torch.float16, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
          "float32": torch.float32, "fp32": torch.float32}  # fmt: skip
MAX_ASPECT = 8  # the FLUX.2 pipelines refuse anything wider or taller
MIN_SIDE = 64  # and anything smaller
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Generation:
    """One call: the picture, what was kept of the references (None without any), and where the time went."""

    image: Image.Image
    selection: Selection | None
    times: Times

    def to_dict(self) -> dict:
        """The report, for JSON: size, what was kept, seconds of each phase."""
        kept = None if self.selection is None else self.selection.to_dict()
        return {"size": list(self.image.size), "selection": kept, "seconds": asdict(self.times)}


def load_pipeline(
    model: str | None = None,
    *,
    dtype: str = "auto",
    device: str | None = None,
    cpu_offload: str | None = None,
    lora: str | None = None,
) -> Any:
    """A supported pipeline from a hub id or a folder in the diffusers layout; the embedded model without `model`.

    dtype: a name of `DTYPES`, or "auto": float32 for the embedded model on a CPU, else bfloat16.
    device: a torch device; None takes an accelerator if there is one. cpu_offload: "model" or "group".
    lora: a safetensors file for this model.
    Only safetensors are read, and nothing is fetched but a hub id that was named.
    """
    from diffusers import DiffusionPipeline

    where = _device(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}: choose auto, {', '.join(DTYPES)}.")
    if cpu_offload not in (None, "model", "group"):
        raise ValueError(f"cpu-offload is {cpu_offload!r}: choose model or group.")
    if lora is not None:
        _check_lora_file(lora)
    path = _check_model(str(WEIGHTS) if model is None else model)
    automatic = torch.float32 if model is None and where.type == "cpu" else torch.bfloat16
    try:
        pipe = DiffusionPipeline.from_pretrained(
            path, torch_dtype=DTYPES.get(dtype, automatic), use_safetensors=True, local_files_only=Path(path).is_dir()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"The model {path} does not load: {_first_line(error)}") from error
    if lora is not None:
        _load_lora(pipe, lora)
    if cpu_offload == "model":
        pipe.enable_model_cpu_offload(device=where)
    elif cpu_offload == "group":
        pipe.enable_group_offload(onload_device=where, offload_type="leaf_level")
    else:
        pipe.to(where)
    return pipe


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.accelerator.current_accelerator() or torch.device("cpu") if _accelerator() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}: pass cpu, cuda, cuda:1, mps or xpu.") from error
    if device.type == "cpu":
        return device
    backend = getattr(torch, device.type, None)
    count = backend.device_count() if backend is not None and hasattr(backend, "device_count") else 0
    if (device.index or 0) >= count:
        raise ValueError(f"device is {name!r}, but this machine has {count} of that kind: use --device cpu.")
    return device


def _accelerator() -> bool:
    return torch.accelerator.is_available()


def _check_model(model: str) -> str:
    """`model` if its pipeline class is supported, before any weights are read."""
    from diffusers import DiffusionPipeline

    folder = Path(model)
    if folder.is_dir():
        index = folder / "model_index.json"
        if not index.is_file():
            raise ValueError(f"The folder {model} holds no model_index.json: pass a model in the diffusers layout.")
        try:
            name = json.loads(index.read_text())["_class_name"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{index} is no diffusers model index: pass a model in the diffusers layout.") from error
    elif HUB_ID.fullmatch(model) and not folder.exists():
        try:
            name = DiffusionPipeline.load_config(model)["_class_name"]
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"The model {model} is neither a folder here nor can it be fetched from the hub: {_first_line(error)}"
            ) from error
    else:
        raise ValueError(f"The model {model} does not exist: pass a folder in the diffusers layout or a hub id.")
    if name not in FAMILIES:
        raise ValueError(f"The model {model} is a {name}; the supported pipelines are {', '.join(FAMILIES)}.")
    if name.endswith("InpaintPipeline"):
        raise ValueError(f"The model {model} is an inpainting pipeline: drive it from Python with apply_sparse_context.")
    return model


def _check_lora_file(path: str) -> None:
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise ValueError(f"The LoRA {path} does not exist: pass a .safetensors file.")
    try:
        with safe_open(path, framework="pt") as f:
            list(f.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"The LoRA {path} is not a safetensors file: nothing else is read, for safety.") from error


def _load_lora(pipe: Any, path: str) -> None:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as f:
        modules = {key.partition(".lora_")[0].removeprefix("transformer.") for key in f.keys() if ".lora_" in key}
    known = {name for name, _ in pipe.transformer.named_modules()}
    model = type(pipe.transformer).__name__
    try:
        if not modules:
            raise ValueError("it holds no LoRA weights")
        if "transformer." in path or modules & known:  # in diffusers' own format every module has to be there
            missing = sorted(modules - known)
            if missing:
                raise ValueError(f"this {model} has no {missing[0]}")
        pipe.load_lora_weights(
            str(Path(path).parent), weight_name=Path(path).name, use_safetensors=True, local_files_only=True
        )
        if not getattr(pipe.transformer, "peft_config", None):
            raise ValueError("none of its modules are in this model")
    except Exception as error:  # the loaders raise many kinds, and all of them mean this
        raise ValueError(f"The LoRA {path} does not fit this model: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return (text[:200] + " ...") if len(text) > 204 else text or type(error).__name__


def call_settings(pipe: Any) -> dict:
    """What this model wants of a call, from the `call.json` beside its weights; else what suits its class."""
    settings = read_call_settings(Path(pipe.config._name_or_path)) or {}
    if not settings and getattr(pipe.config, "is_distilled", False):
        settings = {"num_inference_steps": 4}
    return settings


def fit_reference(picture: Image.Image, side: int | None = None) -> Image.Image:
    """A reference as the host takes it: not below 64 px, no longer than 8:1, and about `side`**2 pixels if given.

    What is longer than 8:1 is padded with white along its short side.
    """
    width, height = picture.size
    if max(width, height) > MAX_ASPECT * min(width, height):
        size = (max(width, math.ceil(height / MAX_ASPECT)), max(height, math.ceil(width / MAX_ASPECT)))
        padded = Image.new(picture.mode, size, (255,) * 3 + (0,) * (picture.mode == "RGBA"))
        padded.paste(picture, ((size[0] - width) // 2, (size[1] - height) // 2))
        picture, (width, height) = padded, size
    scale = 1.0 if side is None else side / math.sqrt(width * height)
    scale = max(scale, MIN_SIDE / min(width, height))
    if scale == 1.0:
        return picture
    size = (max(MIN_SIDE, round(width * scale)), max(MIN_SIDE, round(height * scale)))
    return picture.resize(size, Image.Resampling.LANCZOS)


def generate(
    pipe: Any,
    references: Sequence[Image.Image],
    prompt: str,
    config: SparseContextConfig | None = None,
    *,
    seed: int = 0,
    steps: int | None = None,
    height: int | None = None,
    width: int | None = None,
    guidance_scale: float | None = None,
) -> Generation:
    """One picture from references (RGB or RGBA) and a prompt. `config` stays applied to `pipe` afterwards.

    A model with call settings of its own (`call_settings`) is called by them where no argument says otherwise; its
    references are scaled to the size that it was trained on.
    """
    settings = call_settings(pipe)
    most = settings.get("max_references")
    if most is not None and len(references) > most:
        raise ValueError(f"There are {len(references)} references, and this model takes at most {most}: pass fewer.")
    for name, value in (("steps", steps), ("height", height), ("width", width)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}: pass a number above 0.")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}: pass a number from 0 to {2**63 - 1}.")
    token = 2 * pipe.vae_scale_factor
    for name, value in (("height", height), ("width", width)):
        if value is not None and value % token:
            raise ValueError(f"{name} is {value}: this model makes multiples of {token}, such as {value // token * token or token}.")
    taken = inspect.signature(type(pipe).__call__).parameters
    arguments = {name: value for name, value in settings.items() if name in taken}
    chosen = {"num_inference_steps": steps, "height": height, "width": width, "guidance_scale": guidance_scale}
    if getattr(pipe.config, "is_distilled", False):
        chosen["guidance_scale"] = 1.0
    arguments |= {name: value for name, value in chosen.items() if value is not None and name in taken}
    apply_sparse_context(pipe, config)
    with timed(pipe) as times:
        image = pipe(
            image=[fit_reference(r, settings.get("reference_size")) for r in references] or None,
            prompt=prompt,
            generator=torch.Generator().manual_seed(seed),
            **arguments,
        ).images[0]
    return Generation(image, last_selection(pipe), times)
