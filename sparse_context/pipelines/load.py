"""Loading a pipeline: its class, device, type, offloading and LoRA."""

from pathlib import Path
from typing import Any

import torch

from ..families import FAMILIES
from .embedded import ADAPTERS, WEIGHTS, adapter_record
from .hub import KLEIN, KLEIN_KV, _class_name, _clock, _first_line
from .lora import load_lora
from .lora_file import NO_LORA, check_lora_file, check_lora_scale, read_lora

DTYPES = {
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float32": torch.float32,
    "fp32": torch.float32,
}


def load_pipeline(
    model: str | None = None,
    *,
    dtype: str = "auto",
    device: str | None = None,
    cpu_offload: str | None = None,
    lora: str | None = None,
    lora_scale: float = 1.0,
    kv: bool = False,
) -> Any:
    """A supported pipeline from a hub id or a folder in the diffusers layout; the embedded model without `model`.

    dtype: a name of `DTYPES`, or "auto": float32 for the embedded model on a CPU, else bfloat16.
    device: a torch device; None takes an accelerator if there is one. cpu_offload: "model" or "group".
    lora: a safetensors file for this model, under whichever of the common names (lora.py), or "none". None is the same
    as "none", but that the embedded model then has its own adapter, for dropped tokens, folded into its weights, where
    the package holds one. lora_scale: how much of the LoRA's change of the weights is taken, 0 or more; another than 1
    without a LoRA is refused.
    kv: run a klein model as `Flux2KleinKVPipeline`, for a LoRA that was trained for that (`train --kv`). The embedded
    model then has its adapter for KV mode, where the package holds one. Other pipelines are refused, and klein models
    that need guidance, which that pipeline has none of.
    Only safetensors are read, and nothing is fetched but a hub id that was named.
    """
    where = find_device(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}: choose auto, {', '.join(DTYPES)}.")
    if cpu_offload not in (None, "model", "group"):
        raise ValueError(f"cpu-offload is {cpu_offload!r}: choose model or group.")
    adapter = ADAPTERS["kv" if kv else "plain"]
    own = lora is None and model is None and adapter.is_file()
    if lora == NO_LORA:
        lora = None
    check_lora_scale(lora_scale)
    if lora is not None:
        check_lora_file(lora)
    elif lora_scale != 1 and not own:
        raise ValueError(f"lora-scale is {lora_scale:g}, but there is no LoRA: name one with --lora, or leave it out.")
    path = str(WEIGHTS) if model is None else model
    kind = _class_name(path)
    if kv and kind not in (KLEIN, KLEIN_KV):
        raise ValueError(f"kv is for {KLEIN}, and {path} is a {kind}: leave it out.")
    in_kv_mode = kv or kind == KLEIN_KV
    if lora is not None and adapter_record(Path(lora)).get("kv", in_kv_mode) != in_kv_mode:
        does = "was not trained for KV mode: leave kv out" if in_kv_mode else "was trained for KV mode: pass kv"
        raise ValueError(f"The LoRA {lora} {does}, or name another one.")
    file = None
    if own or lora is not None:
        import diffusers

        if not hasattr(getattr(diffusers, kind), "load_lora_weights"):
            raise ValueError(f"{kind} loads no LoRA: leave it out.")
        file = read_lora(str(adapter) if lora is None else lora)
    modular = FAMILIES[kind].modular
    if modular and cpu_offload == "model":
        raise ValueError("cpu-offload is 'model', which a modular pipeline does not have: choose group.")
    automatic = torch.float32 if model is None and where.type == "cpu" else torch.bfloat16
    try:
        with _clock(f"loading {path}"):
            pipe = (_load_modular if modular else _load_plain)(path, DTYPES.get(dtype, automatic))
    except Exception as error:  # the loaders raise many kinds, and all of them mean this
        raise ValueError(f"The model {path} does not load: {_first_line(error)}.") from error
    for name, part in pipe.components.items():  # diffusers leaves a weight that is not in the file without a value
        if isinstance(part, torch.nn.Module) and any(weight.is_meta for weight in part.parameters()):
            raise ValueError(f"The model {path} is incomplete: weights of its {name} are missing.")
    if getattr(pipe.tokenizer, "vocab_size", 2) < 2:  # without its file a tokenizer loads too, and knows no word
        raise ValueError(f"The model {path} is incomplete: its tokenizer has no words.")
    if kv and kind == KLEIN:
        from diffusers import Flux2KleinKVPipeline

        if not pipe.config.is_distilled:
            raise ValueError(f"kv has no guidance, which {path} needs: name its distilled sibling, or leave kv out.")
        twin = Flux2KleinKVPipeline(**pipe.components)
        twin.register_to_config(_name_or_path=pipe.config._name_or_path)  # by which its call settings are found
        pipe = twin
    if file is not None:
        load_lora(pipe, file, lora_scale)
    if own:
        pipe.fuse_lora()
        pipe.unload_lora_weights()  # what was fused stays
    if cpu_offload == "model":
        pipe.enable_model_cpu_offload(device=where)
    elif cpu_offload == "group" and modular:
        from diffusers.hooks import apply_group_offloading

        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                apply_group_offloading(part, onload_device=where, offload_type="leaf_level")
    elif cpu_offload == "group":
        pipe.enable_group_offload(onload_device=where, offload_type="leaf_level")
    else:
        pipe.to(where)
    return pipe


def _load_plain(path: str, dtype: torch.dtype) -> Any:
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(
        path, dtype=dtype, use_safetensors=True, local_files_only=Path(path).is_dir()
    )


def _load_modular(path: str, dtype: torch.dtype) -> Any:
    """A modular pipeline with diffusers' own blocks, from the prompt as it was written to the picture."""
    from diffusers import ModularPipeline

    local = Path(path).is_dir()
    pipe = ModularPipeline.from_pretrained(path, trust_remote_code=False, local_files_only=local)
    blocks = pipe.blocks
    if "prompt_upsampler" in blocks.sub_blocks:  # a language model of its own, from a place that nobody named
        blocks.sub_blocks.pop("prompt_upsampler")
        pipe = type(pipe)(blocks, path, local_files_only=local)
    for name in pipe.pretrained_component_names:
        spec = pipe.get_component_spec(name)
        source = spec.pretrained_model_name_or_path
        if source != path:
            where = (
                "missing" if source is None else f"not in it but in {source}: load it from Python, where you name that"
            )
            raise ValueError(f"its {name} is {where}")
        weights = issubclass(spec.type_hint, torch.nn.Module)
        settings = {"dtype": dtype, "use_safetensors": True} if weights else {}
        pipe.register_components(**{name: spec.load(local_files_only=local, **settings)})
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
