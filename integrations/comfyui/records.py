"""What the weights in a graph were trained for: a record in their safetensors file (`sparse_context.trained`).

ComfyUI does not keep a file's metadata with the model, so the loaders before a node are looked up in the graph.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from sparse_context.trained import KEY, Trained, read_record

FOLDERS = {"lora_name": "loras", "unet_name": "diffusion_models", "ckpt_name": "checkpoints"}
"""By the name of a loader's input, the folder of ComfyUI that its file is in."""

STRENGTH = "strength_model"  # of a LoRA


def read_records(
    prompt: Mapping[str, Any], node: str, find: Callable[[str, str], str | None]
) -> tuple[list[Trained], list[str]]:
    """The records of the files that the model input of a node comes from, and a sentence for each that is unreadable.

    prompt: the graph, as ComfyUI's API has it. find: (folder, name) -> the file's path, or None.
    """
    records, problems = [], []
    for path in _files(prompt, node, find):
        try:
            with safe_open(path, framework="pt") as file:
                record = (file.metadata() or {}).get(KEY)
            if record is not None:
                records.append(read_record(json.loads(record)))
        except SafetensorError:  # another format, which has no such record
            continue
        except (ValueError, RecursionError, OSError) as error:
            problems.append(f"{Path(path).name}: {error}")
    return records, problems


def _files(prompt: Mapping[str, Any], node: str, find: Callable[[str, str], str | None]) -> Iterator[str]:
    seen: set[str] = set()
    while node in prompt and node not in seen:
        seen.add(node)
        inputs = prompt[node].get("inputs", {})
        for name, folder in FOLDERS.items():
            file = inputs.get(name)
            if isinstance(file, str) and inputs.get(STRENGTH) != 0:
                path = find(folder, file)
                if path is not None and path.endswith(".safetensors"):
                    yield path
        link = inputs.get("model")
        node = str(link[0]) if isinstance(link, list) else ""
