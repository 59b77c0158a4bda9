"""What a run leaves: weights, their record and a model card (card.py)."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ..families.host import Host
from ..images import follow_folder, put_in_place, save_text
from ..trained import FILE, KEY, write_record
from .card import LORA_FILE, model_card
from .checkpoints import remove
from .config import TrainConfig
from .dropping import Dropping
from .files import not_written
from .lora import save_lora
from .processes import Processes
from .sharding import is_sharded, unsharded, whole


def text_autocast(host: Host) -> contextlib.AbstractContextManager:
    """Autocast to the text encoder's type where the transformer has another: a pipeline does not cast what it hands
    over, and `full` makes the transformer alone float32."""
    transformer: Any = host.transformer
    # They are of one type, and a text encoder may be left out
    encoder = (host.pipe.vae if host.pipe.text_encoder is None else host.pipe.text_encoder).dtype
    return (
        contextlib.nullcontext() if encoder == transformer.dtype else torch.autocast(transformer.device.type, encoder)
    )


def save_result(
    host: Host, result: Path, record: Mapping[str, Any], config: TrainConfig, processes: Processes | None = None
) -> None:
    """Write what was trained to `result`, whole or not at all, and a model card beside it.

    processes: those that share the weights; all of them call this, and the main one writes.
    """
    transformer: Any = host.transformer
    writes = processes is None or processes.main
    if config.full:
        if is_sharded(transformer):
            transformer = unsharded(transformer, writes)
    else:
        from diffusers.training_utils import _collate_lora_metadata
        from peft import get_peft_model_state_dict

        layers = {name: whole(tensor) for name, tensor in get_peft_model_state_dict(transformer).items()}
    if not writes:
        return
    partial = result.parent / "result.partial"
    try:
        remove(partial)
        if config.full:
            transformer.save_pretrained(partial)
            save_text(json.dumps(training_record(record), indent=2) + "\n", partial / FILE)
            follow_folder(partial)
            remove(result)
            put_in_place(partial, result)
        else:
            host.pipe.save_lora_weights(
                partial,
                transformer_lora_layers=layers,
                weight_name=LORA_FILE,
                safe_serialization=True,
                **_collate_lora_metadata({"transformer": transformer}),
            )
            with safe_open(partial / LORA_FILE, framework="pt") as file:
                metadata = (file.metadata() or {}) | {KEY: json.dumps(training_record(record))}
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
    """What a result says of its training, of the record of its run with its `steps`.

    `trained.read_record` reads of it what a pipeline does by default.
    """
    dropping = record["dropping"]
    trained = write_record(Dropping(**dropping).trained(record["kv"]))
    if trained["overview"] is not None:
        shares = ("overview_none", "overview_alone", "overview_residual")
        trained["overview"] |= {name.removeprefix("overview_"): dropping[name] for name in shares}
    return {
        "base": record["base"],
        "base_weights": record["base_weights"],
        "steps": record["steps"],
        "dense": dropping["dense"],
        "mix": dropping["mix"],
        "coverage": dropping["coverage"],
        "merge": dropping["merge"],
        "subsets": record["subsets"],
        "distillation": record["distillation"],
        "preservation": record["preservation"],
        "unseen": record["unseen"],
        "quantization": record.get("quantization"),
        **trained,
        "version": record["version"],
    }
