"""Where the embedded model lies in the package, and what its files say."""

import json
from pathlib import Path

from ..trained import KEY, Trained, read_record

WEIGHTS = Path(__file__).parents[1] / "embedded" / "weights"


CALL_FILE = "call.json"


ADAPTERS = {"plain": WEIGHTS / "pytorch_lora_weights.safetensors", "kv": WEIGHTS / "kv.safetensors"}
"""The embedded model's own LoRA for dropped tokens, and that for KV mode: its defaults, where the package has them."""

OVERVIEW = WEIGHTS.with_name("overview.safetensors")
"""What goes on top of the first for overviews (overview_blocks.py), where the package has it."""


def adapter_record(path: Path) -> dict:
    """What an adapter's file says of its training: base and its fingerprint, steps, keep range, drop mix, overviews, KV
    mode. `trained.read_record` has of it what decides defaults.

    Of the embedded model's own also `scale`, the share of what was learned that it takes. Empty for a file that says
    nothing of the kind, as those of others do. Raises ValueError for a file that cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(KEY, "{}")
    except (OSError, SafetensorError) as error:
        again = "install sparse-context again" if path.is_relative_to(WEIGHTS.parent) else "save or fetch it anew"
        raise ValueError(f"{path} cannot be read ({str(error).splitlines()[0]}): {again}.") from error
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def read_trained(path: Path) -> Trained:
    """What the weights in an adapter's file were trained for. Raises ValueError for a file, or a record, that cannot be
    read."""
    record = adapter_record(path)
    try:
        return read_record(record)
    except ValueError as error:
        raise ValueError(f"{path} says in no known way what it was trained for: {error}") from error


def read_call_settings(path: Path) -> dict | None:
    """What the model in folder `path` wants of a call, from its `call.json`; None where there is no such file.

    Keys: height, width, num_inference_steps, max_sequence_length, text_encoder_out_layers (arguments of the pipeline),
    and reference_size (the side in pixels that references are scaled to, for all tasks or {"edit": ..., "subject":
    ...}), max_references.
    """
    file = path / CALL_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
