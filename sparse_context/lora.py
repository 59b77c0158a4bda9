"""A LoRA file: all that it holds, by whatever names, into the pipeline exactly as it is; or one sentence why not.

diffusers' own conversions leave out what they do not know (scales of a DoRA, layers outside the blocks, layers of text
encoders, alphas of some), count blocks and widths of one model, and scale in the number format of the file. Here each
key of the file is told apart first. The layers are found under the names of the tools that write such files: those of
diffusers and of the models' authors, with dots or underscores and any prefix; then peft gets the matrices as they are,
each layer with its own alpha; and at the end what arrived is compared with what the file held.
"""

import contextlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

# Reading --------------------------------------------------------------------------------------------------------------

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
            f"The LoRA {path} is no safetensors file, and nothing else is read, for safety: {reason}."
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
            with _one_sentence(path):  # such as number formats of four bits, which torch has not
                tensor = file.get_tensor(key)
                narrow = tensor.is_floating_point() and tensor.element_size() == 1
                tensors[key] = tensor.bfloat16() if narrow else tensor
    if not tensors:
        raise ValueError(f"Name another LoRA than {path}, which does not fit this model: it is empty.")
    scales = [key for key in tensors if "dora_scale" in key]
    if scales:
        raise misfit(path, f"it is a DoRA, and its {_some(scales, 'scale')} would be lost: pass a LoRA without DoRA")
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
        raise misfit(path, f"it holds no LoRA, but {_some(unknown, 'key')}: pass a LoRA")
    if unknown:
        raise misfit(path, f"{_some(unknown, 'key')} would be lost, being no matrices of a LoRA: pass a plain one")
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


def _some(keys: Sequence[str], noun: str) -> str:
    """How many there are, and one or two of them."""
    count = f"{len(keys)} {noun}{'' if len(keys) == 1 else 's'}"
    return f"{count} ({' and '.join(keys[:2])}{' ...' if len(keys) > 2 else ''})"


def _read_settings(path: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    """peft's settings: from the file's own metadata, or from the file that peft writes beside its own."""
    text, beside = metadata.get("lora_adapter_metadata"), Path(path).with_name("adapter_config.json")
    if not text and Path(path).name == "adapter_model.safetensors" and beside.is_file():
        text = beside.read_text(encoding="utf-8")
    try:
        settings = json.loads(text) if text else {}
    except ValueError as error:
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


# Names of layers ------------------------------------------------------------------------------------------------------

_QKV, _ADDED = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")


def _rows(head: str, *tails: str) -> tuple[str, ...]:
    return tuple(head + tail for tail in tails)


_ATTENTION = {
    "double_blocks.{}.img_attn.qkv": _rows("transformer_blocks.{}.attn.", *_QKV),
    "double_blocks.{}.txt_attn.qkv": _rows("transformer_blocks.{}.attn.", *_ADDED),
    "double_blocks.{}.img_attn.proj": ("transformer_blocks.{}.attn.to_out.0",),
    "double_blocks.{}.txt_attn.proj": ("transformer_blocks.{}.attn.to_add_out",),
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}

ORIGINAL: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "Flux2Transformer2DModel": _ATTENTION
    | {
        "double_blocks.{}.img_mlp.0": ("transformer_blocks.{}.ff.linear_in",),
        "double_blocks.{}.img_mlp.2": ("transformer_blocks.{}.ff.linear_out",),
        "double_blocks.{}.txt_mlp.0": ("transformer_blocks.{}.ff_context.linear_in",),
        "double_blocks.{}.txt_mlp.2": ("transformer_blocks.{}.ff_context.linear_out",),
        "single_blocks.{}.linear1": ("single_transformer_blocks.{}.attn.to_qkv_mlp_proj",),
        "single_blocks.{}.linear2": ("single_transformer_blocks.{}.attn.to_out",),
        "time_in.in_layer": ("time_guidance_embed.timestep_embedder.linear_1",),
        "time_in.out_layer": ("time_guidance_embed.timestep_embedder.linear_2",),
        "guidance_in.in_layer": ("time_guidance_embed.guidance_embedder.linear_1",),
        "guidance_in.out_layer": ("time_guidance_embed.guidance_embedder.linear_2",),
        "double_stream_modulation_img.lin": ("double_stream_modulation_img.linear",),
        "double_stream_modulation_txt.lin": ("double_stream_modulation_txt.linear",),
        "single_stream_modulation.lin": ("single_stream_modulation.linear",),
    },
    "FluxTransformer2DModel": _ATTENTION
    | {
        "double_blocks.{}.img_mlp.0": ("transformer_blocks.{}.ff.net.0.proj",),
        "double_blocks.{}.img_mlp.2": ("transformer_blocks.{}.ff.net.2",),
        "double_blocks.{}.txt_mlp.0": ("transformer_blocks.{}.ff_context.net.0.proj",),
        "double_blocks.{}.txt_mlp.2": ("transformer_blocks.{}.ff_context.net.2",),
        "double_blocks.{}.img_mod.lin": ("transformer_blocks.{}.norm1.linear",),
        "double_blocks.{}.txt_mod.lin": ("transformer_blocks.{}.norm1_context.linear",),
        "single_blocks.{}.linear1": _rows("single_transformer_blocks.{}.", *_rows("attn.", *_QKV), "proj_mlp"),
        "single_blocks.{}.linear2": ("single_transformer_blocks.{}.proj_out",),
        "single_blocks.{}.modulation.lin": ("single_transformer_blocks.{}.norm.linear",),
        "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
        "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
        "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
        "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
        "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
        "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
        # As XLabs trains them
        "double_blocks.{}.processor.qkv_lora1": _rows("transformer_blocks.{}.attn.", *_QKV),
        "double_blocks.{}.processor.qkv_lora2": _rows("transformer_blocks.{}.attn.", *_ADDED),
        "double_blocks.{}.processor.proj_lora1": ("transformer_blocks.{}.attn.to_out.0",),
        "double_blocks.{}.processor.proj_lora2": ("transformer_blocks.{}.attn.to_add_out",),
        "single_blocks.{}.processor.qkv_lora": _rows("single_transformer_blocks.{}.attn.", *_QKV),
        "single_blocks.{}.processor.proj_lora": ("single_transformer_blocks.{}.proj_out",),
    },
    "Flux3Transformer2DModel": {
        "txt_in": ("context_embedder",),
        "time_in.in_layer": ("timestep_embedder.linear_1",),
        "time_in.out_layer": ("timestep_embedder.linear_2",),
        "ref_time_in.in_layer": ("target_timestep_embedder.linear_1",),
        "ref_time_in.out_layer": ("target_timestep_embedder.linear_2",),
        "final_layer.image.linear": ("proj_out",),
        "final_layer.image.adaLN_modulation.1": ("norm_out.linear",),
    },
}
"""The names of the models' authors -> those of diffusers, whose rows follow each other where there are several."""

SPELLINGS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "Flux2Transformer2DModel": ((r"^transformer_blocks\.", "sformer_blocks."),),  # as some cut it
    "Flux3Transformer2DModel": (
        (r"^mode_blocks\.", "content_mode_blocks."),
        (r"^single_transformer_blocks\.", "single_blocks."),
        (r"^x_embedders\.", "emb_in."),
        (r"\.attn\.to_([qkv])$", r".\1_proj"),
        (r"\.attn\.to_out\.0$", ".attn_out"),
        (r"\.ff\.linear_(in|out)$", r".mlp_\1"),
        (r"\.linear$", ".lin"),
    ),
}
"""Other spellings of diffusers' names, any of which may come together."""

SWAPPED = "adaLN_modulation_1"  # whose authors have the shift before the scale, where diffusers has it behind


def _flat(name: str) -> str:
    return name.replace(".", "_")


def layer_names(transformer: nn.Module) -> dict[str, tuple[str, ...]]:
    """The names, with underscores for dots, that a file may have for linear layers, and which layers these are."""
    linear = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    names: dict[str, tuple[str, ...]] = {}
    for name in linear:
        spelled = {name}
        for pattern, other in SPELLINGS.get(type(transformer).__name__, ()):
            spelled |= {re.sub(pattern, other, known) for known in spelled}
        names |= dict.fromkeys(map(_flat, spelled), (name,))
    there = set(linear)
    for original, modules in ORIGINAL.get(type(transformer).__name__, {}).items():
        for number in range(len(linear) if "{}" in original else 1):
            found = tuple(module.format(number) for module in modules)
            if there.issuperset(found):
                names.setdefault(_flat(original.format(number)), found)
    return names


# Loading --------------------------------------------------------------------------------------------------------------

PEFT_KEYS = {
    "down": "lora_A.weight",
    "up": "lora_B.weight",
    "bias": "lora_B.bias",
    "magnitude": "lora_magnitude_vector",
}

Found = Sequence[tuple[Layer, tuple[str, ...]]]
"""Layers of a file, and the linear layers of a module that each is for."""


@dataclass(frozen=True)
class Piece:
    """What one linear layer gets: alpha / rank * (up @ down), or peft's DoRA of that where there is a magnitude."""

    tensors: Mapping[str, torch.Tensor]
    alpha: float

    @property
    def rank(self) -> int:
        return self.tensors["down"].shape[0]


def load_lora(pipe: Any, file: LoraFile, scale: float = 1.0) -> None:
    """Put a LoRA into a pipeline, active: each layer gets scale * alpha / rank * (up @ down) of the file.

    Matrices take the model's number format, as in diffusers. Raises ValueError, before anything is changed, for layers
    that the pipeline does not have, for other shapes, and for text encoders that it takes no LoRA for; and for whatever
    peft does not take.
    """
    text_layers = {name: layer for name, layer in file.text_layers.items() if not _is_zero(layer)}
    encoder = getattr(pipe, "text_encoder", None) if "text_encoder" in pipe._lora_loadable_modules else None
    lost = [layer.key for name, layer in text_layers.items()
            if encoder is None or layer.kronecker or not TEXT_PREFIX.match(name)]  # fmt: skip
    if lost:
        alone = "" if file.layers else ", all that it holds,"
        raise misfit(
            file.path,
            f"{_some(lost, 'layer')}{alone} would be lost, since {type(pipe).__name__} takes no LoRA for that text "
            "encoder: pass one of the transformer alone",
        )
    if not file.layers and not text_layers:
        raise misfit(file.path, "it changes nothing, as all of its numbers are zeros: pass another one")
    kronecker = [layer for layer in file.layers.values() if layer.kronecker]
    others = [layer for layer in (*file.layers.values(), *text_layers.values()) if not layer.kronecker]
    if kronecker and others:
        both = f"{kronecker[0].key} is of a LoKr and {others[0].key} of a LoRA"
        raise misfit(file.path, f"{both}: pass a file with one of the two")
    found = _find(file.path, pipe.transformer, file.layers.values(), PREFIX, layer_names(pipe.transformer))
    with torch.random.fork_rng(devices=()):  # layers that are built for it may draw first, from the user's numbers
        if kronecker:
            _attach_kronecker(file, pipe.transformer, found, scale)
        else:
            pieces = {"transformer": _pieces(file, pipe.transformer, found, "transformer")}
            if text_layers:
                names = {_flat(name).removeprefix("text_model_"): (name,) for (name,) in layer_names(encoder).values()}
                found = _find(file.path, encoder, text_layers.values(), TEXT_PREFIX, names)
                pieces["text_encoder"] = _pieces(file, encoder, found, "text_encoder")
            for component, share in pieces.items():
                if share:
                    _attach(file, pipe, component, share, scale)


def _is_zero(layer: Layer) -> bool:
    return any(not layer.tensors[role].float().any() for role in ("down", "up") if role in layer.tensors)


def _find(
    path: str, module: nn.Module, layers: Iterable[Layer], prefix: re.Pattern, names: Mapping[str, tuple[str, ...]]
) -> Found:
    """Which linear layers of `module` the layers of a file are for. Raises ValueError for layers that it has not."""
    found: list[tuple[Layer, tuple[str, ...]]] = []
    owners: dict[str, Layer] = {}
    unknown = []
    for layer in layers:
        modules = names.get(_flat(prefix.sub("", layer.name, count=1)))
        if modules is None:
            unknown.append(layer.name)
            continue
        for name in modules:
            if name in owners:
                raise misfit(path, f"{owners[name].key} and {layer.key} both change {name}: pass a file with one LoRA")
            owners[name] = layer
        found.append((layer, modules))
    if unknown:
        more = f" and {len(unknown) - 1} more of its layers" if unknown[1:] else ""
        raise misfit(path, f"{type(module).__name__} has no {unknown[0]}{more}: pass a LoRA of this model")
    return found


def _pieces(file: LoraFile, module: nn.Module, found: Found, component: str) -> dict[str, Piece]:
    """What each linear layer of `module` gets, by its name. Raises ValueError for other shapes than it has."""
    settings = _settings_of(file, component)
    begun = str(settings.get("init_lora_weights", "")).lower()
    if begun.startswith(REBASED):
        raise misfit(file.path, f"it belongs to weights that {begun} changed: convert it to a plain LoRA with peft")
    pieces: dict[str, Piece] = {}
    for layer, modules in found:
        linear = [module.get_submodule(name) for name in modules]
        rows = [each.out_features for each in linear]
        tensors = _in_format(file.path, layer, linear[0].weight.dtype)
        rank = tensors["down"].shape[0]
        shapes: dict[str, tuple[int, ...]] = {"down": (rank, linear[0].in_features), "up": (sum(rows), rank)}
        shapes |= dict.fromkeys(("bias", "magnitude"), (sum(rows),))
        for role, tensor in tensors.items():
            if tuple(tensor.shape) != shapes[role]:
                raise misfit(
                    file.path,
                    f"{layer.keys[role]} has shape {tuple(tensor.shape)}, and {' and '.join(modules)} of this model "
                    f"{'need' if modules[1:] else 'needs'} {shapes[role]}: pass a LoRA of this model",
                )
        alpha = _scale(file.path, layer, modules[0], rank, settings) * rank
        parts = {role: [tensor] * len(rows) if role == "down" else list(tensor.split(rows))
                 for role, tensor in tensors.items()}  # fmt: skip
        if _flat(layer.name).endswith(SWAPPED):
            parts = {role: each if role == "down" else [torch.cat(part.chunk(2)[::-1]) for part in each]
                     for role, each in parts.items()}  # fmt: skip
        for i, name in enumerate(modules):
            pieces[name] = Piece({role: each[i].clone() for role, each in parts.items()}, alpha)
    keys = {role: [layer.keys[role] for layer, _ in found if role in layer.keys] for role in ("magnitude", "bias")}
    if (keys["magnitude"] or settings.get("use_dora")) and len(keys["magnitude"]) < len(found):
        held = _some(keys["magnitude"], "scale") if keys["magnitude"] else "no scale"
        raise misfit(
            file.path,
            f"it is a DoRA with {held} for {_some([layer.key for layer, _ in found], 'layer')}: get the whole file",
        )
    if keys["bias"]:  # for peft, all have one then
        for name, piece in pieces.items():
            zeros = piece.tensors["up"].new_zeros(len(piece.tensors["up"]))
            pieces[name] = Piece({"bias": zeros, **piece.tensors}, piece.alpha)
    return pieces


def _in_format(path: str, layer: Layer, model: torch.dtype) -> dict[str, torch.Tensor]:
    """The matrices of a layer in the model's number format, which peft runs them in. Raises ValueError where one has
    numbers that are too large for it."""
    tensors = {}
    for role, tensor in layer.tensors.items():
        if role != "alpha":
            tensors[role] = tensor.to(model)
            if not torch.isfinite(tensors[role]).all():
                wide = str(model).removeprefix("torch.")
                raise misfit(
                    path, f"{layer.keys[role]} has numbers beyond {wide}: run the model in bfloat16 or float32"
                )
    return tensors


def _settings_of(file: LoraFile, component: str) -> dict[str, Any]:
    """peft's settings of one component; those without a component are the transformer's."""
    named = {key.removeprefix(f"{component}."): value for key, value in file.settings.items()
             if key.startswith(f"{component}.")}  # fmt: skip
    if named or component != "transformer":
        return named
    return {key: value for key, value in file.settings.items() if "." not in key}


def _scale(path: str, layer: Layer, name: str, rank: int, settings: Mapping[str, Any]) -> float:
    """What the product of a layer's matrices is multiplied with: alpha / rank, or 1 where nothing says so."""
    stored = layer.tensors["alpha"].item() / rank if "alpha" in layer.tensors else None
    if settings.get("alpha" if layer.kronecker else "lora_alpha") is None:
        return 1.0 if stored is None else stored
    try:
        set_rank, scale = _scale_by_settings(name, rank, "alpha" if layer.kronecker else "lora_alpha", settings)
    except (TypeError, ValueError, ZeroDivisionError, AttributeError, re.error) as error:
        raise misfit(path, f"its settings of peft make no scale of {name} ({error}): save it anew") from error
    if set_rank != rank and not layer.kronecker:
        raise misfit(path, f"{layer.keys['down']} is of rank {rank}, and by its settings of {set_rank}: save it anew")
    if stored is not None and abs(stored - scale) > 1e-6 * abs(scale):
        key = layer.keys["alpha"]
        raise misfit(
            path, f"{key} makes a scale of {stored:g}, and its settings of {scale:g}: save it with one of these"
        )
    return scale


def _scale_by_settings(name: str, rank: int, alpha_name: str, settings: Mapping[str, Any]) -> tuple[int, float]:
    """The rank of a layer and its scale, as peft takes them from its settings."""
    from peft.utils.other import get_pattern_key

    ranks, alphas = settings.get("rank_pattern") or {}, settings.get("alpha_pattern") or {}
    set_rank = ranks.get(get_pattern_key(ranks, name), settings.get("r", rank))
    alpha = alphas.get(get_pattern_key(alphas, name), settings[alpha_name])
    return set_rank, float(alpha / (set_rank**0.5 if settings.get("use_rslora") else set_rank))


def _attach(file: LoraFile, pipe: Any, component: str, pieces: Mapping[str, Piece], scale: float) -> None:
    module = getattr(pipe, component)
    rank = Counter(piece.rank for piece in pieces.values()).most_common(1)[0][0]
    alpha = Counter(piece.alpha for piece in pieces.values()).most_common(1)[0][0]
    settings = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(n)}": piece.rank for n, piece in pieces.items() if piece.rank != rank},
        "alpha_pattern": {f"^{re.escape(n)}": piece.alpha for n, piece in pieces.items() if piece.alpha != alpha},
        "target_modules": "|".join(map(re.escape, pieces)),  # whole names, where a list would be endings
        "use_dora": any("magnitude" in piece.tensors for piece in pieces.values()),
        "lora_bias": any("bias" in piece.tensors for piece in pieces.values()),
    }
    state = {f"{name}.{PEFT_KEYS[role]}": tensor for name, piece in pieces.items()
             for role, tensor in piece.tensors.items()}  # fmt: skip
    common = {"adapter_name": ADAPTER_NAME, "low_cpu_mem_usage": True}
    with _one_sentence(file.path):
        if component == "transformer":
            module.load_lora_adapter(state, prefix=None, metadata=settings, **common)
        else:
            named = ({f"{component}.{name}": value for name, value in each.items()} for each in (state, settings))
            state, settings = named
            pipe.load_lora_into_text_encoder(state, None, module, prefix=component, metadata=settings, **common)
    there = {name: layer for name, layer in module.named_modules() if ADAPTER_NAME in getattr(layer, "lora_A", ())}
    arrived = there.keys() == pieces.keys() and all(
        torch.equal(there[name].lora_A[ADAPTER_NAME].weight.cpu(), piece.tensors["down"])
        and torch.equal(there[name].lora_B[ADAPTER_NAME].weight.cpu(), piece.tensors["up"])
        and there[name].scaling[ADAPTER_NAME] == piece.alpha / piece.rank
        for name, piece in pieces.items()
    )
    _check_arrival(file, arrived, len(there))
    for layer in there.values():
        layer.set_scale(ADAPTER_NAME, scale)


def _attach_kronecker(file: LoraFile, transformer: Any, found: Found, scale: float) -> None:
    """The same for a LoKr, whose changes are Kronecker products, which cannot be split by rows."""
    settings = _settings_of(file, "transformer")
    state: dict[str, torch.Tensor] = {}
    wanted: dict[str, torch.Tensor] = {}
    for layer, modules in found:
        head, _, last = modules[0].rpartition(".")
        tails = tuple(name.rpartition(".")[2] for name in modules)
        if modules[1:]:
            fused = {_QKV: "to_qkv", _ADDED: "to_added_qkv"}  # type: dict[tuple[str, ...], str]
            last = fused.get(tails, "")
        if not last or _flat(layer.name).endswith(SWAPPED):
            raise misfit(
                file.path, f"{layer.key} is a Kronecker product, which does not fit {modules[0]}: pass a plain LoRA"
            )
        linear = [transformer.get_submodule(name) for name in modules]
        tensors = _in_format(file.path, layer, linear[0].weight.dtype)
        inner = [tensors[f"{w}_b"].shape[0] for w in ("w2", "w1") if f"{w}_b" in tensors]
        # Only what has a rank is scaled by an alpha of the file, as LyCORIS does it, but all by one of peft's settings
        scaled = _scale(file.path, layer, modules[0], inner[0] if inner else 1, settings) if inner or settings else 1.0
        first = "w1" if "w1" in tensors else "w1_a"
        tensors[first] = tensors[first] * scaled
        factors = [tensors[w] if w in tensors else tensors[f"{w}_a"] @ tensors[f"{w}_b"] for w in ("w1", "w2")]
        change = torch.kron(*factors)
        shape = sum(each.out_features for each in linear), linear[0].in_features
        if tuple(change.shape) != shape:
            raise misfit(
                file.path,
                f"{layer.key} makes a change of shape {tuple(change.shape)}, and {' and '.join(modules)} of this model "
                f"{'need' if modules[1:] else 'needs'} {shape}: pass a LoRA of this model",
            )
        name = f"{head}.{last}".removeprefix(".")
        wanted[name] = change
        state |= {f"{name}.lokr_{role}": tensor for role, tensor in tensors.items()}
    with _one_sentence(file.path):
        transformer.load_lora_adapter(state, prefix=None, adapter_name=ADAPTER_NAME, low_cpu_mem_usage=True)
    there = {name: layer for name, layer in transformer.named_modules() if hasattr(layer, "get_delta_weight")}
    arrived = there.keys() == wanted.keys() and all(
        torch.allclose(there[name].get_delta_weight(ADAPTER_NAME).cpu(), change) for name, change in wanted.items()
    )
    _check_arrival(file, arrived, len(there))
    for layer in there.values():
        layer.set_scale(ADAPTER_NAME, scale)


ADAPTER_NAME = "default_0"  # what diffusers calls the first one


@contextlib.contextmanager
def _one_sentence(path: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the loaders raise many kinds, and all of them mean this
        reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
        raise misfit(path, f"it does not load ({reason}): pass a plain LoRA") from error


def _check_arrival(file: LoraFile, arrived: bool, count: int) -> None:
    if not arrived:
        some = _some([layer.key for layer in file.layers.values()], "layer")
        raise misfit(file.path, f"of its {some} {count} arrived, and not all as they were: pass a plain LoRA")
