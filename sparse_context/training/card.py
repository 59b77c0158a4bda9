"""The model card of a result: `model_card.md`, with its placeholders filled in."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from ..families import family_of
from ..overview import factor_for
from ..pipelines.embedded import WEIGHTS, read_call_settings
from .dropping import FEW
from .sharding import plain_class

LORA_FILE = "pytorch_lora_weights.safetensors"

EMBEDDED = "the embedded model"  # as the base of a run


def model_card(record: Mapping[str, Any], pipe: Any, transformer: Any) -> str:
    """The README.md of a result, with the front matter that the hub reads; its code loads it in plain diffusers."""
    template = Template(Path(__file__).with_name("model_card.md").read_text(encoding="utf-8"))
    return template.substitute(_base(record) | _code(record, pipe, transformer) | _settings(record))


def _is_local(base: str) -> bool:
    """Whether a base is a folder of this machine, which says nothing to others."""
    return base != EMBEDDED and Path(base).exists()


def _name(base: str) -> str:
    """The base as the code names it."""
    if base == EMBEDDED:
        return "WEIGHTS"
    return json.dumps(f"path/to/{Path(base).name}" if _is_local(base) else base)


def _base(record: Mapping[str, Any]) -> dict[str, str]:
    """What the result is, and of what."""
    base, full = str(record["base"]), record["full"]
    tags = ["diffusers", "diffusers-training", *([] if full else ["lora"]), "image-to-image", "sparse-context"]
    return {
        "hub": "" if base == EMBEDDED or _is_local(base) else f"base_model: {json.dumps(base)}\n",
        "tags": "\n".join(f"- {tag}" for tag in tags),
        "what": "All weights" if full else f"LoRA of rank {record['rank']}, alpha {record['lora_alpha']:g}",
        "of": base if base == EMBEDDED else _name(base),
    }


def _code(record: Mapping[str, Any], pipe: Any, transformer: Any) -> dict[str, str]:
    """The lines that load the result."""
    pipeline, architecture = type(pipe).__name__, plain_class(transformer).__name__
    full, base = record["full"], str(record["base"])
    name, note = _name(base), ""
    if record["kv"] and not getattr(pipe.config, "is_distilled", True):  # such a LoRA is for the distilled sibling
        sibling = base.replace("-klein-base-", "-klein-")
        name = _name(sibling if sibling != base else "the-distilled-sibling")
        note = "  # the distilled sibling of the base"
    trained = f'{architecture}.from_pretrained("transformer", dtype=torch.bfloat16)'
    if family_of(pipe).modular:
        load = f"pipe = {pipeline}.from_pretrained({name})\npipe.load_components(dtype=torch.bfloat16)"
        load += f"\npipe.update_components(transformer={trained})" if full else ""
    elif full:
        load = f"pipe = {pipeline}.from_pretrained({name}, transformer={trained}, dtype=torch.bfloat16)"
    else:
        load = f"pipe = {pipeline}.from_pretrained({name}, dtype=torch.bfloat16){note}"
    if not full:
        load += f'\npipe.load_lora_weights(".", weight_name="{LORA_FILE}", use_safetensors=True)'
    weights = call = ""
    if base == EMBEDDED:
        weights = "\nfrom sparse_context.pipelines.embedded import WEIGHTS"
        settings = read_call_settings(WEIGHTS) or {}
        names = ("height", "width", "num_inference_steps", "max_sequence_length", "text_encoder_out_layers")
        arguments = ", ".join(f"{name}={settings[name]!r}" for name in names if name in settings)
        call = f'\nimage = pipe(image=[...], prompt="...", {arguments}).images[0]'
    imports = f"{architecture}, {pipeline}" if full else pipeline
    return {"imports": imports, "weights": weights, "load": load, "keep": _keep(record["dropping"]), "call": call}


def _keep(dropping: Mapping[str, Any]) -> str:
    """What is asked of `apply_sparse_context`: with its overview, for plain diffusers notes nothing of what the weights
    were trained for."""
    factors = sorted(dropping["overview_factors"])
    if not factors:
        return "keep=0.2"
    factor = next((factor for factor in factors if factor >= factor_for(0.2, (1, 1))), factors[-1])
    keep = 0.2 if factor**-2 < 0.2 else 0.3
    return f'keep={keep}, overview={factor}, overview_layout="{dropping["overview_layout"]}"'


def _settings(record: Mapping[str, Any]) -> dict[str, str]:
    """The rows of the table."""
    dropping, data = record["dropping"], str(record["data"])
    muon, quantization = record["muon_learning_rate"], record.get("quantization")
    numbers = {name: f"{record[name]:g}" for name in ("learning_rate", "distillation", "preservation", "unseen")}
    return numbers | {
        "steps": _steps(record),
        "data": Path(data).name if os.path.exists(data) else data,
        "keep_min": f"{dropping['keep_min']:g}",
        "keep_max": f"{dropping['keep_max']:g}",
        "law": _law(dropping),
        "dense": f"{dropping['dense']:g}",
        "overviews": _overviews(dropping),
        "subsets": str(record["subsets"]),
        "mix": ", ".join(f"{kind} {share:g}" for kind, share in dropping["mix"].items() if share),
        "coverage": ", ".join(f"{share:g}" for share in dropping["coverage"]),
        "merge": ", ".join(f"{share:g}" for share in dropping["merge"]),
        "muon": "" if muon is None else f", of Muon {muon:g}",
        "schedule": record["lr_scheduler"],
        "focus": f"{1 + record['focus']:g}",
        "quantization": "" if quantization is None else f"\n| frozen weights | {quantization} |",
        "kv": "\n| KV mode | yes: for pipelines that cache the references |" if record["kv"] else "",
        "version": record["version"],
    }


def _law(dropping: Mapping[str, Any]) -> str:
    """How keep ratios are drawn."""
    least = [max(dropping["keep_min"], factor**-2) for factor in dropping["overview_factors"]]
    has_few = bool(least) and min(least) < FEW < dropping["keep_max"]
    return f"as many below {FEW:g} as above" if has_few else "log-uniform"


def _steps(record: Mapping[str, Any]) -> str:
    """The row of the table: what one step was, too, where that was more than a batch of one process."""
    batches, processes = record["gradient_accumulation_steps"], record["processes"]
    each = "one batch" if batches == 1 else f"{batches} batches"
    on = "" if processes == 1 else f" on each of {processes} processes"
    return f"{record['steps']}" + (f", {each} a step{on}" if batches > 1 or processes > 1 else "")


def _overviews(dropping: Mapping[str, Any]) -> str:
    """The row of the table, or nothing."""
    if not dropping["overview_factors"]:
        return ""
    factors = " or ".join(str(factor) for factor in sorted(set(dropping["overview_factors"])))
    return (
        f"\n| overviews | by {factors}, layout {dropping['overview_layout']}; of the batches that drop, "
        f"{dropping['overview_none']:g} without and {dropping['overview_alone']:g} with nothing else |"
    )
