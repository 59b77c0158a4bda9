"""Loading a pipeline: its class, device, dtype, quantisation, offloading and LoRA."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..families import FAMILIES
from ..families.flux2.kv import in_kv_mode
from ..trained import note_trained, read_folder, trained_for
from .embedded import ADAPTERS, OVERVIEW, WEIGHTS, adapter_record, read_trained
from .errors import TooLargeError
from .hub import KLEIN, KLEIN_KV, class_name_of, clock, one_line
from .lora import ADAPTER_NAME, load_lora
from .lora_file import NO_LORA, OVERVIEW_LORA, LoraFile, check_lora_file, read_lora
from .overview_blocks import with_overviews
from .quantization import GgufTransformer, Nf4OnCpu, Quantized, QuantizedTransformer, find_quantization
from .spec import ModelSpec

DTYPES = {
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float32": torch.float32,
    "fp32": torch.float32,
}


def load(spec: ModelSpec | None = None, leave_out: Sequence[str] = ()) -> Any:
    """The pipeline that `spec` names, on its device, with its LoRA; the embedded model without one.

    leave_out: parts of a plain pipeline that are not loaded and stay None; without the transformer `spec` is to name no
    LoRA, no quantisation and no KV mode.

    Only safetensors are read (and a GGUF file that was named), and nothing is fetched but a hub id that was named.
    Raises ValueError, in one sentence, for what is not there, does not belong together or does not load, and
    TooLargeError where the device has too little memory for it.
    """
    spec = spec or ModelSpec()
    device = find_device(spec.device)
    path = str(WEIGHTS) if spec.model is None else spec.model
    adapter = ADAPTERS["kv" if spec.kv else "plain"]
    shows_overviews = spec.lora == OVERVIEW_LORA
    if shows_overviews:
        _check_overview(spec)
    has_adapter = (spec.lora is None or shows_overviews) and spec.model is None and adapter.is_file()
    lora = None if spec.lora == NO_LORA or shows_overviews else spec.lora
    if lora is not None:
        check_lora_file(lora)
    elif spec.lora_scale != 1 and not has_adapter:
        raise ValueError(f"lora_scale is {spec.lora_scale:g}, but there is no LoRA: name one as lora, or leave it out.")
    class_name = class_name_of(path)
    _check_kv(path, class_name, spec.kv, lora)
    file = _read_lora(class_name, str(adapter) if has_adapter else lora)
    lora_trained = None if file is None else read_trained(Path(file.path))
    modular = FAMILIES[class_name].modular
    if modular and spec.cpu_offload == "model":
        raise ValueError("cpu_offload is 'model', which a modular pipeline does not have: choose group.")
    automatic = torch.float32 if spec.model is None and device.type == "cpu" else torch.bfloat16
    dtype = DTYPES.get(spec.dtype, automatic)
    transformer = find_quantization(spec, device, dtype)
    try:
        with clock(f"loading {path}"):
            pipe = (
                _load_modular(path, dtype, transformer) if modular else _load_plain(path, dtype, transformer, leave_out)
            )
    except Exception as error:  # the loaders raise many kinds, and all of them mean this
        raise ValueError(f"The model {path} does not load: {one_line(error)}.") from error
    _check_complete(path, pipe)
    if spec.kv and class_name == KLEIN:
        if not pipe.config.is_distilled:
            raise ValueError(f"kv has no guidance, which {path} needs: name its distilled sibling, or leave kv out.")
        pipe = in_kv_mode(pipe)
    if isinstance(transformer, Nf4OnCpu):
        transformer.place(pipe.transformer)
    trained = read_folder(Path(path) / "transformer")
    if trained is not None and pipe.transformer is not None:
        note_trained(pipe.transformer, trained)
    if file is not None and lora_trained is not None:
        load_lora(pipe, file, spec.lora_scale)
        note_trained(pipe.transformer, lora_trained, ADAPTER_NAME)
    if has_adapter and spec.quantization is None:
        pipe.fuse_lora()
        trained = trained_for(pipe.transformer, spec.kv)
        pipe.unload_lora_weights()  # what was fused stays
        if trained is not None:
            note_trained(pipe.transformer, trained)
    if shows_overviews:
        pipe.transformer = with_overviews(pipe.transformer, OVERVIEW)
        note_trained(pipe.transformer, read_trained(OVERVIEW))
    if spec.vae is not None:
        speed_up_vae(pipe.vae, spec.vae)
    try:
        _place(pipe, device, spec.cpu_offload, modular)
    except torch.OutOfMemoryError as error:
        advice = "cpu_offload or quantization" if spec.cpu_offload is None else "cpu_offload='group' or quantization"
        raise TooLargeError(f"The model {path} does not fit into the memory of {device}: pass {advice}.") from error
    return pipe


def _check_overview(spec: ModelSpec) -> None:
    """Raise ValueError where the embedded model's weights for overviews do not go with the rest."""
    if spec.model is not None:
        raise ValueError(
            f"lora is {OVERVIEW_LORA!r}, which the embedded model alone has: leave it out, or name one of {spec.model}."
        )
    said = "The embedded model's weights for overviews"
    if spec.kv:
        raise ValueError(f"{said} were not trained for KV mode: leave kv out, or the overview.")
    if spec.lora_scale != 1:
        raise ValueError(f"{said} have no scale, and lora_scale is {spec.lora_scale:g}: leave it out, or the overview.")
    if spec.quantization is not None:
        raise ValueError(
            f"{said} are not quantised, and quantization is {spec.quantization!r}: leave it out, or the overview."
        )
    missing = [str(file) for file in (ADAPTERS["plain"], OVERVIEW) if not file.is_file()]
    if missing:
        raise ValueError(f"{said} are incomplete, {' and '.join(missing)} missing: install sparse-context again.")


def _check_kv(path: str, class_name: str, kv: bool, lora: str | None) -> None:
    """Raise ValueError where a model, KV mode and a LoRA do not go together."""
    if kv and class_name not in (KLEIN, KLEIN_KV):
        raise ValueError(f"kv is for {KLEIN}, and {path} is a {class_name}: leave it out.")
    in_kv_mode = kv or class_name == KLEIN_KV
    if lora is not None and adapter_record(Path(lora)).get("kv", in_kv_mode) != in_kv_mode:
        does = "was not trained for KV mode: leave kv out" if in_kv_mode else "was trained for KV mode: pass kv"
        raise ValueError(f"The LoRA {lora} {does}, or name another one.")


def _read_lora(class_name: str, path: str | None) -> LoraFile | None:
    import diffusers

    if path is None:
        return None
    if not hasattr(getattr(diffusers, class_name), "load_lora_weights"):
        raise ValueError(f"{class_name} loads no LoRA: leave it out.")
    return read_lora(path)


def _check_complete(path: str, pipe: Any) -> None:
    """Raise ValueError for a pipeline that loaded without a word although something of it is missing."""
    for name, part in pipe.components.items():  # diffusers leaves a weight that is not in the file without a value
        if isinstance(part, torch.nn.Module) and any(weight.is_meta for weight in part.parameters()):
            raise ValueError(f"The model {path} is incomplete: weights of its {name} are missing.")
    if getattr(pipe.tokenizer, "vocab_size", 2) < 2:  # without its file a tokenizer loads too, and knows no word
        raise ValueError(f"The model {path} is incomplete: its tokenizer has no words.")


def speed_up_vae(vae: Any, how: str) -> None:
    """Let a VAE run as `ModelSpec.vae` says."""
    orders = {4: torch.channels_last, 5: torch.channels_last_3d}  # a VAE for videos has weights of both kinds
    for weight in vae.parameters():
        if weight.ndim in orders:
            weight.data = weight.data.contiguous(memory_format=orders[weight.ndim])
    if how == "compiled":
        for part in (vae.encoder, vae.decoder):
            part.compile()


def _place(pipe: Any, device: torch.device, cpu_offload: str | None, modular: bool) -> None:
    """Move the pipeline to the device, or have its parts moved there while they work."""
    if cpu_offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif cpu_offload == "group" and modular:
        from diffusers.hooks import apply_group_offloading

        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                apply_group_offloading(part, onload_device=device, offload_type="leaf_level")
    elif cpu_offload == "group":
        pipe.enable_group_offload(onload_device=device, offload_type="leaf_level")
    else:
        pipe.to(device)


def _load_plain(
    path: str, dtype: torch.dtype, transformer: Quantized | None = None, leave_out: Sequence[str] = ()
) -> Any:
    from diffusers import DiffusionPipeline

    local = Path(path).is_dir()
    has = DiffusionPipeline.load_config(path, local_files_only=local) if leave_out else {}
    parts: dict[str, Any] = {name: None for name in leave_out if name in has}
    if isinstance(transformer, GgufTransformer):
        parts["transformer"] = transformer.load(path, dtype, local)
    elif isinstance(transformer, QuantizedTransformer):
        parts["quantization_config"] = transformer.of_pipeline()
    return DiffusionPipeline.from_pretrained(path, dtype=dtype, use_safetensors=True, local_files_only=local, **parts)


def _load_modular(path: str, dtype: torch.dtype, transformer: Quantized | None = None) -> Any:
    """A modular pipeline with diffusers' own blocks, from the prompt as it was written to the picture."""
    from diffusers import ModularPipeline

    local = Path(path).is_dir()
    pipe = ModularPipeline.from_pretrained(path, trust_remote_code=False, local_files_only=local)
    blocks = pipe.blocks
    if "prompt_upsampler" in blocks.sub_blocks:  # a language model of its own, from a place that nobody named
        blocks.sub_blocks.pop("prompt_upsampler")
        pipe = type(pipe)(blocks, path, local_files_only=local)
    for name in pipe.pretrained_component_names:
        part = pipe.get_component_spec(name)
        source = part.pretrained_model_name_or_path
        if source != path:
            where = (
                "missing" if source is None else f"not in it but in {source}: load it from Python, where you name that"
            )
            raise ValueError(f"its {name} is {where}")
        if name == "transformer" and isinstance(transformer, GgufTransformer):
            pipe.register_components(transformer=transformer.load(path, dtype, local, part.type_hint))
            continue
        weights = issubclass(part.type_hint, torch.nn.Module)
        settings: dict[str, Any] = {"dtype": dtype, "use_safetensors": True} if weights else {}
        if name == "transformer" and isinstance(transformer, QuantizedTransformer):
            settings["quantization_config"] = transformer.config
        pipe.register_components(**{name: part.load(local_files_only=local, **settings)})
    return pipe


def find_device(name: str | None) -> torch.device:
    """The device of this name, the best one without a name. Raises ValueError for one that is not there."""
    if name is None:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}: pass cpu, cuda, cuda:1, mps or xpu.") from error
    if device.type == "cpu":
        return device
    backend = getattr(torch, device.type, None)
    count = backend.device_count() if backend is not None and hasattr(backend, "device_count") else 0
    if (device.index or 0) >= count:
        raise ValueError(f"device is {name!r}, but this machine has {count} of that kind: pass cpu, or leave it out.")
    return device


def hide_loading_bars() -> None:
    """Leave stderr to the bars of the steps and of downloads."""
    import diffusers.utils.logging
    import huggingface_hub.utils
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()  # this one hides the bars of downloads too
    huggingface_hub.utils.enable_progress_bars()
