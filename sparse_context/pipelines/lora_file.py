"""A LoRA file: all that it holds, by whatever names, into the pipeline exactly as it is; or one sentence why not.

diffusers' own conversions leave out what they do not know (scales of a DoRA, layers outside the blocks, layers of text
encoders, alphas of some), count blocks and widths of one model, and scale in the number format of the file. Here each
key of the file is told apart first. The layers are found under the names of the tools that write such files: those of
diffusers and of the models' authors, with dots or underscores and any prefix; then peft gets the matrices as they are,
each layer with its own alpha; and at the end what arrived is compared with what the file held.
"""

import contextlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

ADAPTER = r"(?:\.(?!weight$|bias$)[\w-]+)?"  # peft's name of an adapter inside a key, such as "default"


ROLES = {
    "down": re.compile(rf"(.+?)\.(?:lora_A{ADAPTER}|lora_down|lora\.down|lora_linear_layer\.down)\.weight"),
    "up": re.compile(rf"(.+?)\.(?:lora_B{ADAPTER}|lora_up|lora\.up|lora_linear_layer\.up)\.weight"),
    "bias": re.compile(rf"(.+?)\.(?:lora_B{ADAPTER}|lora_up)\.bias"),
    "alpha": re.compile(r"(.+?)\.alpha"),
    "magnitude": re.compile(r"(.+?)\.lora_magnitude_vector(?:\.[\w-]+)?"),
    **{name: re.compile(rf"(.+?)\.lokr_{name}") for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")},
}
"""What a key of the file is to its layer, whose name is the group."""


XLABS = {"down": re.compile(r"(.+_lora\d?)\.down\.weight"), "up": re.compile(r"(.+_lora\d?)\.up\.weight")}


PREFIX = re.compile(
    r"(?:base_model\.model\.|model\.diffusion_model\.|diffusion_model\.|transformer\.|lora_unet_|lora_transformer_"
    r"|lycoris_|module\.|_orig_mod\.)+"
)


TEXT = re.compile(r"(?:base_model\.model\.)?(?:text_encoder|text_model|lora_te|te\d?[._]|cond_stage_model|conditioner)")


TEXT_PREFIX = re.compile(r"(?:text_encoder\.|lora_te1?_|text_encoders\.clip_l\.transformer\.)(?:text_model[._])?")
"""Of the first text encoder: the one of FLUX.1 that diffusers takes a LoRA for."""


REBASED = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to begin a LoRA that change the weights which it belongs to."""


@dataclass
class Layer:
    """What a file holds of one layer, by role, and under which keys."""

    name: str
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def kronecker(self) -> bool:
        return any(role.startswith("w") for role in self.tensors)

    @property
    def key(self) -> str:
        """One to show: of a matrix if there is one."""
        return next((key for role, key in self.keys.items() if role != "alpha"), self.keys.get("alpha", self.name))


@dataclass(frozen=True)
class LoraFile:
    """A file, whole: `layers` of the transformer and `text_layers` of text encoders, by the names in the file.

    settings: those of peft, where the file has them, as diffusers writes them.
    """

    path: str
    layers: Mapping[str, Layer]
    text_layers: Mapping[str, Layer]
    settings: Mapping[str, Any]


def check_lora_file(path: str) -> None:
    """Raise ValueError for what is no safetensors file. Nothing of it is read but its head."""
    if not Path(path).is_file():
        is_what = "a folder" if Path(path).is_dir() else "not there"
        raise ValueError(f"The LoRA {path} is {is_what}: pass a .safetensors file.")
    try:
        if Path(path).suffix != ".safetensors":  # others could be pickles
            raise ValueError(f"its name ends in {Path(path).suffix or 'nothing'}")
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise ValueError(
            f"The LoRA {path} is not a safetensors file, and for safety nothing else is read: {reason}."
        ) from (error)


def misfit(path: str, cause: str) -> ValueError:
    """The error for a LoRA that is not taken. cause: a clause, and after a colon what to do."""
    return ValueError(f"The LoRA {path} does not fit this model: {' '.join(cause.split())}.")


def read_lora(path: str) -> LoraFile:
    """Everything in a LoRA file. Numbers of eight bits become bfloat16, which holds each of them exactly.

    Raises ValueError for a file that is none, for keys whose meaning would be lost, and for matrices without their
    other half or with numbers that are not finite.
    """
    check_lora_file(path)
    tensors = {}
    with safe_open(path, framework="pt") as file:
        settings = _read_settings(path, file.metadata() or {})
        for key in file.keys():  # noqa: SIM118 (it is no dictionary)
            with one_sentence(path):  # such as number formats of four bits, which torch has not
                tensor = file.get_tensor(key)
                narrow = tensor.is_floating_point() and tensor.element_size() == 1
                tensors[key] = tensor.bfloat16() if narrow else tensor
    if not tensors:
        raise ValueError(f"Name another LoRA than {path}, which does not fit this model: it is empty.")
    scales = [key for key in tensors if "dora_scale" in key]
    if scales:
        raise misfit(
            path, f"it is a DoRA, and its {name_some(scales, 'scale')} would be lost: pass a LoRA without DoRA"
        )
    layers: dict[str, Layer] = {}
    text_layers: dict[str, Layer] = {}
    unknown = []
    for key, tensor in tensors.items():
        role, name = _role(key)
        if role is None:
            # What changes nothing is not lost: some tools write such zeros
            unknown += [key] if not re.search(r"\.diff(_b)?$", key) or tensor.float().any() else []
            continue
        layer = (text_layers if TEXT.match(key) else layers).setdefault(name, Layer(name))
        if role in layer.keys:
            raise misfit(
                path, f"{layer.keys[role]} and {key} are the same matrix of one layer: pass a file with one LoRA"
            )
        layer.tensors[role], layer.keys[role] = tensor, key
    if unknown and not any(len(layer.keys.keys() - {"alpha"}) for layer in (*layers.values(), *text_layers.values())):
        raise misfit(path, f"it holds no LoRA, but {name_some(unknown, 'key')}: pass a LoRA")
    if unknown:
        raise misfit(path, f"{name_some(unknown, 'key')} would be lost, being no matrices of a LoRA: pass a plain one")
    for layer in (*layers.values(), *text_layers.values()):
        _check_layer(path, layer)
    return LoraFile(path, layers, text_layers, settings)


def _role(key: str) -> tuple[str | None, str]:
    """What a key is, and the name of its layer; None and the key itself where it is nothing of a LoRA."""
    for role, pattern in (*ROLES.items(), *XLABS.items()):
        found = pattern.fullmatch(key)
        if found:
            return role, found[1]
    return None, key


def name_some(keys: Sequence[str], noun: str) -> str:
    """How many there are, and one or two of them."""
    count = f"{len(keys)} {noun}{'' if len(keys) == 1 else 's'}"
    return f"{count} ({' and '.join(keys[:2])}{' ...' if len(keys) > 2 else ''})"


def _read_settings(path: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    """peft's settings: from the file's own metadata, or from the file that peft writes beside its own."""
    text, beside = metadata.get("lora_adapter_metadata"), Path(path).with_name("adapter_config.json")
    if not text and Path(path).name == "adapter_model.safetensors" and beside.is_file():
        text = beside.read_bytes().decode("utf-8", "replace")
    try:
        settings = json.loads(text) if text else {}
    except (ValueError, RecursionError) as error:
        raise misfit(path, f"its settings of peft cannot be read ({error}): save it anew") from error
    return settings if isinstance(settings, dict) else {}


def _check_layer(path: str, layer: Layer) -> None:
    """Raise ValueError for a layer of which something is missing, or that says nothing finite."""
    roles = layer.keys.keys()
    for key, tensor in zip(layer.keys.values(), layer.tensors.values(), strict=True):
        if not tensor.is_floating_point() and key != layer.keys.get("alpha"):
            raise misfit(
                path, f"{key} has whole numbers ({str(tensor.dtype).removeprefix('torch.')}): save it in floats"
            )
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"Name another LoRA than {path}, which with {key} does not fit this model: some of its weights are no "
                "finite numbers."
            )
    if layer.kronecker:
        wrong = [role for role in roles if not role.startswith("w") and role != "alpha"]
        whole = all({w} <= roles or {f"{w}_a", f"{w}_b"} <= roles for w in ("w1", "w2")) and not wrong
        missing = "a factor of its Kronecker product"
    else:
        whole = {"down", "up"} <= roles
        other = "lora_B or lora_up" if "down" in roles else "lora_A or lora_down"
        missing = f"the other matrix of its pair ({other})" if {"down", "up"} & roles else "its two matrices"
    if not whole:
        raise misfit(path, f"{layer.key} is there without {missing}: get the whole file")
    if "alpha" in roles and layer.tensors["alpha"].numel() != 1:
        raise misfit(
            path,
            f"{layer.keys['alpha']} has shape {tuple(layer.tensors['alpha'].shape)}, not one number: pass a plain LoRA",
        )
    for role in roles - {"alpha"}:
        sides = 1 if role in ("bias", "magnitude") else 2
        if layer.tensors[role].ndim != sides:
            shape = tuple(layer.tensors[role].shape)
            raise misfit(path, f"{layer.keys[role]} has shape {shape}, of no linear layer: pass a plain LoRA")
    if not layer.kronecker:
        down, up = layer.tensors["down"].shape[0], layer.tensors["up"].shape[1]
        if down != up or not down:
            ranks = f"{layer.keys['down']} is of rank {down} and {layer.keys['up']} of rank {up}"
            raise misfit(path, f"{ranks}: get the whole file")


@contextlib.contextmanager
def one_sentence(path: str) -> Iterator[None]:
    """Within it, whatever goes wrong with a LoRA is one sentence (`misfit`)."""
    try:
        yield
    except Exception as error:  # the loaders raise many kinds, and all of them mean this
        reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
        raise misfit(path, f"it does not load ({reason}): pass a plain LoRA") from error


NO_LORA = "none"
OVERVIEW_LORA = "overview"
"""The embedded model's weights for overviews, which is more than a LoRA (overview_blocks.py)."""


def check_lora_scale(lora_scale: float) -> None:
    """Raise ValueError for a share of a LoRA that is out of range."""
    if not 0 <= lora_scale < math.inf:
        raise ValueError(f"lora_scale is {lora_scale!r}: pass a number of 0 or more.")
