"""What is shipped of a run of overviews: a base with new blocks that add nothing, and the LoRA that lets them.

The new blocks' first projections, which say where their heads look and what they read there, are a part of the base.
Their last ones are zero in it, and the LoRA's to fill: so whoever has no LoRA has what the base was before. The new
blocks lie in the file as eight-bit floats, which half of the shipped size depends on.
"""

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sparse_context.images import put_in_place
from sparse_context.pipelines.embedded import ADAPTERS, WEIGHTS, adapter_record
from sparse_context.pipelines.load import load
from sparse_context.pipelines.lora_file import NO_LORA
from sparse_context.pipelines.spec import ModelSpec
from sparse_context.training.cache import fingerprint
from sparse_context.training.checkpoints import load_average
from sparse_context.training.lora import extract_lora, save_lora

from .overview_blocks import FIRST, NEW, grown, new_layer, without_new_blocks
from .overview_sets import OverviewConfig
from .overview_start import EIGHT_BIT
from .run_folder import swap_in

FILE = "diffusion_pytorch_model.safetensors"
READS = ("attn.to_qkv_mlp_proj.weight", "attn.norm_q.weight", "attn.norm_k.weight")
WRITES = "attn.to_out"


def base_with(student: Any, base: Any) -> Any:
    """The base with the new blocks of `student`, rounded to eight bits, whose last projections are zero."""
    whole, learned = grown(without_new_blocks(base)), student.state_dict()
    state = whole.state_dict()
    for name, tensor in state.items():
        if new_layer(name) in READS:
            state[name] = learned[name].to(EIGHT_BIT).to(tensor.dtype)
    whole.load_state_dict(state)
    return whole


def export_overview(folder: Path, name: str = "overview", destination: Path = WEIGHTS, rank: int = 28) -> Path:
    """Write the average of the run `folder/name` as the embedded model's base and LoRA into `destination`, whole or not
    at all; returns the LoRA's file. rank: of the LoRA outside of the new blocks, and of the one for KV mode, which is
    cut down to it and goes with the new base."""
    base = load(ModelSpec(dtype="float32", device="cpu", lora=NO_LORA)).transformer
    student = grown(without_new_blocks(base))
    steps = load_average(folder / name, student)
    whole = base_with(student, base)
    tuned = copy.deepcopy(student)
    tuned.load_state_dict(
        {n: whole.state_dict()[n] if new_layer(n) in READS else t for n, t in student.state_dict().items()}
    )
    lora = extract_lora(whole, tuned, lambda layer: {WRITES: 4 * rank, "": rank}.get(new_layer(layer), 0))
    _save_base(whole, destination / "transformer")
    stamp = fingerprint(type(whole).from_pretrained(destination / "transformer", dtype=torch.float32))
    before, config = adapter_record(ADAPTERS["plain"]), OverviewConfig()
    kinds = dict(config.mix)
    record = {
        "base": before["base"],
        "base_weights": stamp,
        "steps": steps,
        "keep": list(config.keep),
        "overview": {"factors": list(config.factors), "layout": "spread", "alone": kinds["alone"]},
        "plain": kinds["plain"],
        "subsets": config.subsets,
        "kv": False,
        "version": before["version"],
        "rank": rank,
        "scale": 1.0,
    }
    _save_adapter(lora, destination / ADAPTERS["plain"].name, {"format": "pt"}, record)
    kv = destination / ADAPTERS["kv"].name
    shifted = cut(moved_behind(load_file(kv)) if adapter_record(kv)["base_weights"] != stamp else load_file(kv), rank)
    _save_adapter(shifted, kv, {"format": "pt"}, adapter_record(kv) | {"base_weights": stamp, "rank": rank})
    return destination / ADAPTERS["plain"].name


def _save_base(whole: Any, place: Path) -> None:
    partial = place.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    copy.deepcopy(whole).to(torch.bfloat16).save_pretrained(partial)
    with safe_open(partial / FILE, framework="pt") as file:
        metadata = file.metadata()
    state = load_file(partial / FILE)
    save_file({n: t.to(EIGHT_BIT) if new_layer(n) else t for n, t in state.items()}, partial / FILE, metadata)
    swap_in(partial, place)


def _save_adapter(
    tensors: Mapping[str, torch.Tensor], place: Path, metadata: Mapping[str, str], record: Mapping[str, Any]
) -> None:
    partial = place.with_suffix(".partial")
    said = dict(metadata) | {"sparse_context": json.dumps(dict(record))}
    save_lora({n: t.to(torch.bfloat16).contiguous() for n, t in tensors.items()}, partial, said)
    put_in_place(partial, place)


def moved_behind(lora: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A LoRA for the base as it was, for the one with new blocks."""
    moved = {}
    for name, tensor in lora.items():
        head, _, rest = name.partition("single_transformer_blocks.")
        number, _, part = rest.partition(".")
        if rest and int(number) >= FIRST:
            name = f"{head}single_transformer_blocks.{int(number) + NEW}.{part}"
        moved[name] = tensor
    return moved


@torch.no_grad()
def cut(lora: Mapping[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    """A LoRA whose alpha is its rank, at a smaller rank: the nearest, by SVD."""
    smaller = dict(lora)
    for name, down in lora.items():
        if ".lora_A." in name and down.shape[0] > rank:
            other = name.replace(".lora_A.", ".lora_B.")
            left, strengths, right = torch.linalg.svd(lora[other].float() @ down.float(), full_matrices=False)
            root = strengths[:rank].sqrt()
            smaller[name], smaller[other] = root[:, None] * right[:rank], left[:, :rank] * root
    return smaller
