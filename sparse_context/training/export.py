"""What a run leaves: weights, their record and a model card."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ..families import family_of
from ..families.host import Host
from ..images import follow_folder, put_in_place, save_text
from ..pipelines.embedded import WEIGHTS, read_call_settings
from .checkpoints import remove
from .config import TrainConfig
from .files import not_written
from .lora import save_lora

LORA_FILE = "pytorch_lora_weights.safetensors"


RECORD_FILE = "sparse_context.json"  # beside all weights, what the metadata of a LoRA holds


EMBEDDED = "the embedded model"  # as the base of a run


def _as_text(host: Host) -> contextlib.AbstractContextManager:
    """Autocast to the text encoder's type where the transformer has another: a pipeline does not cast what it hands
    over, and `full` makes the transformer alone float32."""
    weight = next(host.transformer.parameters())
    encoder = next(host.pipe.text_encoder.parameters()).dtype
    return contextlib.nullcontext() if encoder == weight.dtype else torch.autocast(weight.device.type, encoder)


def save_result(host: Host, result: Path, record: Mapping[str, Any], config: TrainConfig) -> None:
    """Write what was trained to `result`, whole or not at all, and a model card beside it."""
    transformer: Any = host.transformer
    partial = result.parent / "result.partial"
    try:
        remove(partial)
        if config.full:
            transformer.save_pretrained(partial)
            save_text(json.dumps(training_record(record), indent=2) + "\n", partial / RECORD_FILE)
            follow_folder(partial)
            remove(result)
            put_in_place(partial, result)
        else:
            from diffusers.training_utils import _collate_lora_metadata
            from peft import get_peft_model_state_dict

            host.pipe.save_lora_weights(
                partial,
                transformer_lora_layers=get_peft_model_state_dict(transformer),
                weight_name=LORA_FILE,
                safe_serialization=True,
                **_collate_lora_metadata({"transformer": transformer}),
            )
            with safe_open(partial / LORA_FILE, framework="pt") as file:
                metadata = (file.metadata() or {}) | {"sparse_context": json.dumps(training_record(record))}
            save_lora(load_file(partial / LORA_FILE), partial / "whole", metadata)
            follow_folder(partial / "whole")
            put_in_place(partial / "whole", result)
    except Exception as error:  # the libraries that write raise many kinds
        raise not_written(result, error) from error
    finally:
        with contextlib.suppress(OSError):
            remove(partial)
    save_text(model_card(record, host.pipe, transformer), result.parent / "README.md")


def training_record(record: Mapping[str, Any]) -> dict:
    """What a result says of its training, of the record of its run with its `steps`."""
    dropping = record["dropping"]
    return {
        "base": record["base"],
        "base_weights": record["base_weights"],
        "steps": record["steps"],
        "keep": [dropping["keep_min"], dropping["keep_max"]],
        "dense": dropping["dense"],
        "mix": dropping["mix"],
        "coverage": dropping["coverage"],
        "merge": dropping["merge"],
        "subsets": record["subsets"],
        "distillation": record["distillation"],
        "preservation": record["preservation"],
        "unseen": record["unseen"],
        "kv": record["kv"],
        "version": record["version"],
    }


def model_card(record: Mapping[str, Any], pipe: Any, transformer: Any) -> str:
    """The README.md of a result, with the front matter that the hub reads; its code loads it in plain diffusers."""
    pipeline, architecture = type(pipe).__name__, type(transformer).__name__
    dropping, full = record["dropping"], record["full"]
    mix = ", ".join(f"{kind} {share:g}" for kind, share in dropping["mix"].items() if share)
    what = "all weights" if full else f"LoRA of rank {record['rank']}, alpha {record['lora_alpha']:g}"
    base, data = str(record["base"]), str(record["data"])
    own = base == EMBEDDED
    local = not own and Path(base).exists()  # a folder of this machine says nothing to others
    shown = "WEIGHTS" if own else json.dumps(f"path/to/{Path(base).name}" if local else base)
    hub = "" if own or local else f"base_model: {json.dumps(base)}\n"
    trained = f'{architecture}.from_pretrained("transformer", dtype=torch.bfloat16)'
    if family_of(pipe).modular:
        load = f"pipe = {pipeline}.from_pretrained({shown})\npipe.load_components(dtype=torch.bfloat16)"
        load += f"\npipe.update_components(transformer={trained})" if full else ""
    elif full:
        load = f"pipe = {pipeline}.from_pretrained({shown}, transformer={trained}, dtype=torch.bfloat16)"
    else:
        load = f"pipe = {pipeline}.from_pretrained({shown}, dtype=torch.bfloat16)"
    if not full:
        load += f'\npipe.load_lora_weights(".", weight_name="{LORA_FILE}", use_safetensors=True)'
    weights = "\nfrom sparse_context.pipelines.embedded import WEIGHTS" if own else ""
    call = ""
    if own:
        settings = read_call_settings(WEIGHTS) or {}
        wanted = ("height", "width", "num_inference_steps", "max_sequence_length", "text_encoder_out_layers")
        given = ", ".join(f"{name}={settings[name]!r}" for name in wanted if name in settings)
        call = f'\nimage = pipe(image=[...], prompt="...", {given}).images[0]'
    imports = f"{f'{architecture}, ' if full else ''}{pipeline}"
    tags = "\n".join(
        f"- {tag}"
        for tag in ("diffusers", "diffusers-training", *([] if full else ["lora"]), "image-to-image", "sparse-context")
    )
    muon = "" if record["muon_learning_rate"] is None else f", of Muon {record['muon_learning_rate']:g}"
    kv = "\n| KV mode | yes: for pipelines that cache the references |" if record["kv"] else ""
    return f"""---
{hub}library_name: diffusers
pipeline_tag: image-to-image
tags:
{tags}
---

# Trained for dropped reference tokens

{what[0].upper() + what[1:]} of {base if own else shown}, fine-tuned with a part of the reference tokens dropped, by
[Sparse Context](https://arxiv.org/abs/2606.23682)'s method, so that the model keeps its quality when it sees only some.

```python
import torch
from diffusers import {imports}
from sparse_context import apply_sparse_context{weights}

{load}
apply_sparse_context(pipe, keep=0.2){call}
```

| setting | value |
|---|---|
| steps | {record["steps"]}, {record["gradient_accumulation_steps"]} batches each on {record["processes"]} processes |
| data | `{Path(data).name if Path(data).exists() else data}` |
| tokens kept | {dropping["keep_min"]:g} to {dropping["keep_max"]:g} of each reference, log-uniform |
| batches with all tokens | {dropping["dense"]:g} |
| sets of tokens for each batch | {record["subsets"]} |
| drop mix | {mix} |
| evenly spread share | one of {", ".join(f"{c:g}" for c in dropping["coverage"])} |
| share of averages | one of {", ".join(f"{c:g}" for c in dropping["merge"])} |
| learning rate | {record["learning_rate"]:g}{muon}, {record["lr_scheduler"]} |
| distillation | {record["distillation"]:g} |
| preservation | {record["preservation"]:g} |
| weight of the object | {1 + record["focus"]:g} times |
| weight of what was dropped | {record["unseen"]:g} times, where it is known |{kv}

Made with sparse-context {record["version"]}. Quality was not measured by this training; see `sparse-context evaluate`.
The base model's licence applies.
"""
