"""What a LoRA file holds, into the pipeline exactly as it is."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .lora_file import PREFIX, REBASED, TEXT_PREFIX, Layer, LoraFile, misfit, name_some, one_sentence

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
    encoder: Any = getattr(pipe, "text_encoder", None) if "text_encoder" in pipe._lora_loadable_modules else None
    lost = [
        layer.key
        for name, layer in text_layers.items()
        if encoder is None or layer.kronecker or not TEXT_PREFIX.match(name)
    ]
    if lost:
        alone = "" if file.layers else ", all that it holds,"
        raise misfit(
            file.path,
            f"{name_some(lost, 'layer')}{alone} would be lost, since {type(pipe).__name__} takes no LoRA for that text "
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
        linear: list[Any] = [module.get_submodule(name) for name in modules]
        rows = [each.out_features for each in linear]
        tensors = _in_format(file.path, layer, _number_format(linear[0], module))
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
        parts = {
            role: [tensor] * len(rows) if role == "down" else list(tensor.split(rows))
            for role, tensor in tensors.items()
        }
        if _flat(layer.name).endswith(SWAPPED):
            parts = {
                role: each if role == "down" else [torch.cat(part.chunk(2)[::-1]) for part in each]
                for role, each in parts.items()
            }
        for i, name in enumerate(modules):
            pieces[name] = Piece({role: each[i].clone() for role, each in parts.items()}, alpha)
    keys = {role: [layer.keys[role] for layer, _ in found if role in layer.keys] for role in ("magnitude", "bias")}
    if (keys["magnitude"] or settings.get("use_dora")) and len(keys["magnitude"]) < len(found):
        held = name_some(keys["magnitude"], "scale") if keys["magnitude"] else "no scale"
        raise misfit(
            file.path,
            f"it is a DoRA with {held} for {name_some([layer.key for layer, _ in found], 'layer')}: get the whole file",
        )
    if keys["bias"]:  # for peft, all have one then
        for name, piece in pieces.items():
            zeros = piece.tensors["up"].new_zeros(len(piece.tensors["up"]))
            pieces[name] = Piece({"bias": zeros, **piece.tensors}, piece.alpha)
    return pieces


def _number_format(linear: Any, module: Any) -> torch.dtype:
    """What a linear layer of `module` computes in: the weights of a quantised one are packed into whole numbers."""
    if linear.weight.is_floating_point():
        return linear.weight.dtype
    return getattr(linear, "compute_dtype", None) or module.dtype


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
    named = {
        key.removeprefix(f"{component}."): value
        for key, value in file.settings.items()
        if key.startswith(f"{component}.")
    }
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
    state = {
        f"{name}.{PEFT_KEYS[role]}": tensor for name, piece in pieces.items() for role, tensor in piece.tensors.items()
    }
    common = {"adapter_name": ADAPTER_NAME, "low_cpu_mem_usage": True}
    with one_sentence(file.path):
        if component == "transformer":
            module.load_lora_adapter(state, prefix=None, metadata=settings, **common)
        else:
            state = {f"{component}.{name}": tensor for name, tensor in state.items()}
            settings = {f"{component}.{name}": value for name, value in settings.items()}
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
        tensors = _in_format(file.path, layer, _number_format(linear[0], transformer))
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
    with one_sentence(file.path):
        transformer.load_lora_adapter(state, prefix=None, adapter_name=ADAPTER_NAME, low_cpu_mem_usage=True)
    there = {name: layer for name, layer in transformer.named_modules() if hasattr(layer, "get_delta_weight")}
    arrived = there.keys() == wanted.keys() and all(
        torch.allclose(there[name].get_delta_weight(ADAPTER_NAME).cpu(), change) for name, change in wanted.items()
    )
    _check_arrival(file, arrived, len(there))
    for layer in there.values():
        layer.set_scale(ADAPTER_NAME, scale)


ADAPTER_NAME = "default_0"  # what diffusers calls the first one


def _check_arrival(file: LoraFile, arrived: bool, count: int) -> None:
    if not arrived:
        some = name_some([layer.key for layer in file.layers.values()], "layer")
        raise misfit(file.path, f"of its {some} {count} arrived, and not all as they were: pass a plain LoRA")
