"""References and a prompt in, a picture out: what the command line calls.

Bad input raises ValueError (or one of its kinds) with one sentence that says what is wrong and what to do.
"""

import contextlib
import inspect
import json
import math
import re
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from .families import FAMILIES, Family, family_of
from .lora import check_lora_file, load_lora, read_lora
from .mini import ADAPTERS, CALL_FILE, WEIGHTS, adapter_record, read_call_settings
from .preview import fit_reference, reference_mask
from .selection import Selection, SparseContextConfig, per_reference
from .selectors import Blend, Mask
from .sparsify import apply_sparse_context, last_selection
from .speed.timing import Times, timed

DTYPES = {"float16": torch.float16, "fp16": torch.float16, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
          "float32": torch.float32, "fp32": torch.float32}  # fmt: skip
INDEXES = ("model_index.json", "modular_model_index.json")
NO_LORA = "none"
KLEIN, KLEIN_KV = "Flux2KleinPipeline", "Flux2KleinKVPipeline"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
MOST_STEPS, MOST_PIXELS = 1000, 16384  # of a call; pixels a side
HUB_TIMEOUT = 10  # seconds until the hub counts as out of reach
PATIENCE = 2.0  # seconds until one wants to know what is waited for


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


@contextlib.contextmanager
def _clock(what: str) -> Iterator[None]:
    """On a terminal, say after a while (`PATIENCE`) what is waited for, and for how long; nothing of it stays.

    For the command line, which hides diffusers' own bars: they stay, and what is wrong is to be one sentence there.
    """
    from diffusers.utils.logging import is_progress_bar_enabled

    if is_progress_bar_enabled() or not sys.stderr.isatty():
        yield
        return
    done, start = threading.Event(), time.time()

    def tick() -> None:
        if done.wait(PATIENCE):
            return
        with tqdm(desc=what, bar_format="{desc}: {elapsed}", leave=False) as bar:  # which makes room for downloads
            bar.start_t = start
            while not done.wait(PATIENCE / 4):
                bar.refresh()

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def check_lora_scale(lora_scale: float) -> None:
    """Raise ValueError for a share of a LoRA that is out of range."""
    if not 0 <= lora_scale < math.inf:
        raise ValueError(f"lora-scale is {lora_scale!r}: pass a number of 0 or more.")


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


def check_references(model: str | None, count: int, inpaint: bool) -> None:
    """Refuse what a model's pipeline cannot take, before any weights are read. Raises ValueError.

    count: how many references there are. inpaint: whether there is a mask of what to paint over.
    """
    path = str(WEIGHTS) if model is None else model
    name = _class_name(path)
    _check_references(name, FAMILIES[name], count, inpaint, _read_settings(path).get("max_references"))


def check_call(
    prompt: str, seed: int, steps: int | None, height: int | None, width: int | None, guidance_scale: float | None
) -> None:
    """Raise ValueError for what no model takes, of the arguments of `generate`: before one is loaded, if need be."""
    dials = ("steps", steps, MOST_STEPS), ("height", height, MOST_PIXELS), ("width", width, MOST_PIXELS)
    for dial, value, most in dials:
        if value is not None and value < 1:
            raise ValueError(f"{dial} is {value}: pass a number above 0.")
        if value is not None and value > most:
            raise ValueError(f"{dial} is {value}: pass {most} at most.")
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise ValueError(f"The prompt {prompt!r} has bytes that are no text: write it in UTF-8.")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}: pass a number from 0 to {2**63 - 1}.")
    if guidance_scale is not None and not 0 <= guidance_scale < math.inf:
        raise ValueError(f"guidance_scale is {guidance_scale}: pass a number of 0 or more.")


def most_references(model: str | None) -> int | None:
    """How many references a model takes at most, by its index and its call settings; None where nothing says so.

    No weights are read. Raises ValueError where the model is not there, or not supported.
    """
    path = str(WEIGHTS) if model is None else model
    limits = FAMILIES[_class_name(path)].most, _read_settings(path).get("max_references")
    return min((limit for limit in limits if limit is not None), default=None)


def _check_references(name: str, family: Family, count: int, inpaint: bool, most: int | None) -> None:
    if most is not None and count > most:
        raise ValueError(f"There are {count} references, and this model takes at most {most}: pass fewer.")
    if family.most is not None and count > family.most:
        raise ValueError(f"There are {count} references, and {name} takes at most {family.most}: pass fewer.")
    if count < family.fewest:
        raise ValueError(f"There are {count} references, and {name} needs at least {family.fewest}: pass --image.")
    if family.paints and not inpaint:
        raise ValueError(f"{name} paints into its first picture: pass --inpaint, a mask of where to paint.")
    if inpaint and not family.paints:
        painters = ", ".join(painter for painter, known in FAMILIES.items() if known.paints)
        raise ValueError(f"{name} does not paint into a picture: leave --inpaint out, or use one of {painters}.")


def _class_name(model: str) -> str:
    """The pipeline class that the index of a folder or hub id names, if it is supported."""
    folder = Path(model)
    if folder.is_dir():
        index = next((folder / name for name in INDEXES if (folder / name).is_file()), None)
        if index is None:
            raise ValueError(f"The folder {model} holds no {INDEXES[0]}: pass a model in the diffusers layout.")
    elif HUB_ID.fullmatch(model) and not folder.exists() and not folder.is_symlink():
        index = _fetch_index(model)
    elif folder.name in INDEXES and folder.is_file():
        raise ValueError(f"The model {model} is a file, the index of a model: pass the folder that holds it.")
    elif folder.is_file():
        raise ValueError(
            f"The model {model} is a file, and a pipeline is many: pass a folder in the diffusers layout or a hub id."
        )
    elif folder.exists() or folder.is_symlink():
        raise ValueError(
            f"The model {model} is {'neither a folder nor a file' if folder.exists() else 'a link to nothing'}: pass a "
            "folder in the diffusers layout or a hub id."
        )
    else:
        raise ValueError(f"The model {model} does not exist: pass a folder in the diffusers layout or a hub id.")
    try:
        name = str(json.loads(index.read_text(encoding="utf-8"))["_class_name"])
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"{index} is no diffusers model index: pass a model in the diffusers layout.") from error
    if name not in FAMILIES:
        raise ValueError(f"The model {model} is a {name}; the supported pipelines are {', '.join(FAMILIES)}.")
    return name


def _fetch_index(model: str) -> Path:
    """The index of a hub id, of either kind: from the cache if it is there, else from the hub."""
    from huggingface_hub import errors, hf_hub_download, model_info

    reasons = {
        errors.GatedRepoError: "accept its terms there first, and log in with `hf auth login`",
        errors.RepositoryNotFoundError: "none has this name, or it is private: log in with `hf auth login`",
        errors.EntryNotFoundError: "it has no model_index.json there",
        errors.HFValidationError: "that is no id of a model",
    }
    try:
        for name in INDEXES:
            try:
                return Path(hf_hub_download(model, name, local_files_only=True))
            except errors.LocalEntryNotFoundError:
                continue
        model_info(model, timeout=HUB_TIMEOUT)  # hf_hub_download would try for half a minute when offline
        try:
            return Path(hf_hub_download(model, INDEXES[0]))
        except errors.EntryNotFoundError:
            return Path(hf_hub_download(model, INDEXES[1]))
    except Exception as error:  # also kinds of the HTTP library that the client happens to use
        other = _first_line(error)
        if not isinstance(error, errors.HfHubHTTPError):
            other = f"it is out of reach, check the connection ({other})"
        reason = next((text for kind, text in reasons.items() if isinstance(error, kind)), other)
        raise ValueError(f"The model {model} is no folder here, and the hub does not give it: {reason}.") from error


def _first_line(error: BaseException) -> str:
    text = textwrap.shorten(str(error), 300, placeholder=" …")
    return text.rstrip(".!") or type(error).__name__


def call_inputs(pipe: Any) -> Container[str]:
    """The names of what a call of this pipeline takes, such as "height"."""
    return pipe.blocks.input_names if family_of(pipe).modular else inspect.signature(type(pipe).__call__).parameters


def call_settings(pipe: Any) -> dict:
    """What this model wants of a call, from the `call.json` beside its weights; else what suits its class.

    Raises ValueError for a file that cannot be read.
    """
    source = getattr(pipe.config, "_name_or_path", None)  # None for a pipeline that was built in code
    if family_of(pipe).modular:
        source = pipe._pretrained_model_name_or_path
    settings = _read_settings(source) if source else {}
    if not settings and getattr(pipe.config, "is_distilled", False):
        settings = {"num_inference_steps": 4}
    if family_of(pipe).guidance == "true_cfg_scale":  # which does nothing without a negative prompt
        settings.setdefault("negative_prompt", " ")
    return settings


def _read_settings(source: str) -> dict:
    try:
        return dict(read_call_settings(Path(source)) or {})
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(f"The {CALL_FILE} of {source} holds no call settings: {_first_line(error)}.") from error


def reference_sides(reference_size: Any, config: SparseContextConfig, count: int) -> list[int | None]:
    """The size that each reference is scaled to, where a model says it: one number, or one for each task.

    Under the task "auto" one reference is taken for a picture to edit, several for subjects, as `task_defaults` does;
    a global edit is an edit. Raises ValueError for another number of tasks.
    """
    tasks = per_reference("task", config.task, count)
    if not isinstance(reference_size, Mapping):
        return [reference_size] * count
    kinds = {"auto": "edit" if count == 1 else "subject", "global": "edit"}
    return [reference_size.get(kinds.get(task, task)) for task in tasks]


Fit = Callable[[Image.Image], Image.Image]


def _fit_masks(selector: Any, fits: Sequence[Fit]) -> Any:
    """`selector` with the user's masks in it scaled and padded as `fits` do with the pictures of each reference."""
    if isinstance(selector, Mask):
        # What is beyond the references stays as it is, and is refused where tokens are selected
        pairs = zip_longest(selector.masks, fits[: len(selector.masks)])
        return Mask([m if m is None or fit is None else np.asarray(fit(Image.fromarray(m))) for m, fit in pairs])
    if isinstance(selector, Blend):
        return Blend([(_fit_masks(part, fits), weight) for part, weight in selector.parts])
    if isinstance(selector, Mapping):
        return {_fit_masks(part, fits): weight for part, weight in selector.items()}
    if isinstance(selector, (list, tuple)):
        return [_fit_masks(part, fits[i : i + 1]) for i, part in enumerate(selector)]
    return selector


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
    inpaint: Image.Image | None = None,
) -> Generation:
    """One picture from references (RGB or RGBA) and a prompt. `config` stays applied to `pipe` afterwards.

    inpaint: for a pipeline that paints into the first reference, a mask (mode L) of its size, white where to paint.

    A model with call settings of its own (`call_settings`) is called by them where no argument says otherwise; its
    references, and the masks in `config` with them, are scaled to the size that it was trained on (`fit_reference`).
    Raises ValueError for arguments out of range, and for whatever the pipeline itself raises.
    """
    family, name = family_of(pipe), type(pipe).__name__
    settings = call_settings(pipe)
    config = config or SparseContextConfig()
    _check_references(name, family, len(references), inpaint is not None, settings.get("max_references"))
    taken = call_inputs(pipe)
    check_call(prompt, seed, steps, height, width, guidance_scale)
    token = 2 * pipe.vae_scale_factor
    for dial, value in (("height", height), ("width", width)):
        if value is not None and dial not in taken:
            raise ValueError(f"{dial} is {value}, but {name} takes the shape of its reference: leave it out.")
        if value is not None and value % token:
            near = max(1, round(value / token)) * token
            raise ValueError(f"{dial} is {value}: this model makes multiples of {token}, such as {near}.")
    distilled, guider = getattr(pipe.config, "is_distilled", False), getattr(pipe, "guider", None)
    if guidance_scale is not None and (distilled or (guider is None and family.guidance not in taken)):
        raise ValueError(f"guidance_scale is {guidance_scale}, but this distilled model takes none: leave it out.")
    for i, reference in enumerate(references):
        reference_mask(config.selector, i, reference)  # raises for a mask of another size
    if inpaint is not None and inpaint.size != references[0].size:
        raise ValueError(
            f"The mask to paint in is {inpaint.width}x{inpaint.height}, but the first reference is "
            f"{references[0].width}x{references[0].height}: pass a mask of its size."
        )

    sides = reference_sides(settings.get("reference_size"), config, len(references))
    fits: list[Fit] = [partial(fit_reference, side=side, narrow=family.narrow) for side in sides]
    pictures = [fit(reference) for fit, reference in zip(fits, references, strict=True)]
    images: dict[str, Any] = {"image": pictures or None}
    if inpaint is not None:
        images = {"image": pictures[0], "mask_image": fits[0](inpaint)}
        if pictures[1:]:
            images["image_reference"] = pictures[1:]
    elif family.most == 1:
        images["image"] = pictures[0] if pictures else None
    if "max_area" in taken and (height or width):  # Kontext scales the size that it is given to this many pixels
        default = pipe.default_sample_size * pipe.vae_scale_factor
        height, width = height or default, width or default
        images["max_area"] = height * width
    chosen = {"num_inference_steps": steps, "height": height, "width": width, family.guidance: guidance_scale}
    if distilled:
        chosen[family.guidance] = 1.0  # what it is run with anyhow
    arguments = settings | {dial: value for dial, value in chosen.items() if value is not None}
    arguments = {dial: value for dial, value in arguments.items() if dial in taken} | images
    arguments = {dial: value for dial, value in arguments.items() if value is not None}
    if family.modular:
        arguments["output"] = "images"
    apply_sparse_context(pipe, replace(config, selector=_fit_masks(config.selector, fits)))
    if guider is not None and guidance_scale is not None:
        pipe.update_components(guider=guider.new(guidance_scale=guidance_scale))
    try:
        with timed(pipe) as times:
            made = pipe(prompt=prompt, generator=torch.Generator().manual_seed(seed), **arguments)
    except ValueError:
        raise
    except Exception as error:  # memory that ran out, parts that do not belong together, settings of another model
        raise ValueError(f"{name} failed: {_first_line(error)}.") from error
    finally:
        if guider is not None and pipe.guider is not guider:
            pipe.update_components(guider=guider)
    return Generation((made if family.modular else made.images)[0], last_selection(pipe), times)
