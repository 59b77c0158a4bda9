"""What an encoder made, on disk."""

import contextlib
import hashlib
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..images import FULL, error_number, follow_folder, put_in_place


def fingerprint(module: nn.Module) -> str:
    """16 hex digits that tell a model from others: its class, and a sample of each weight."""
    digest = hashlib.sha256(str(type(module)).encode())
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if is_traceable_wrapper_subclass(tensor):  # torchao's, which has no view of what it stores
            digest.update(type(tensor).__name__.encode())
            tensor = cast(torch.Tensor, tensor).dequantize()
        digest.update(tensor.flatten()[:: max(1, tensor.numel() // 64)].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


class Cache:
    """What an encoder made, on disk: one safetensors file each, under a hash of what it was made from and by.

    On disk and not in memory, because it outlives the run and processes share it. Files that are damaged, or hold what
    was made from something else, are made anew: each has a digest of its key and of its tensors.
    """

    def __init__(self, folder: Path, encoder: nn.Module, settings: Mapping[str, Any] | None = None) -> None:
        """settings: what else decides what the encoder makes, such as how many tokens of a prompt it reads."""
        said = repr(sorted(settings.items())).encode() if settings else b""
        self._folder = folder / (fingerprint(encoder) + (f"-{hashlib.sha256(said).hexdigest()[:8]}" if said else ""))

    def get(self, key: bytes, make: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """What was made from `key` before, or else `make()`, which is kept. Tensors are on the CPU."""
        name = hashlib.sha256(key).hexdigest()
        file = self._folder / name[:2] / f"{name}.safetensors"
        if file.is_file():
            try:
                with safe_open(file, framework="pt") as found:
                    # Copies, for Windows replaces no file that is mapped
                    tensors = {part: found.get_tensor(part).clone() for part in found.keys()}  # noqa: SIM118
                    digest = (found.metadata() or {}).get("digest")
                if digest == _digest(name, tensors):
                    return tensors
            except (SafetensorError, OSError):
                pass  # half a file of another file system's making
        tensors = {part: tensor.detach().cpu().contiguous() for part, tensor in make().items()}
        partial = file.with_suffix(f".{os.getpid()}-{secrets.token_hex(4)}.partial")  # machines may share the folder
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, partial, {"digest": _digest(name, tensors)})
            follow_folder(partial)
            put_in_place(partial, file)
        except (SafetensorError, OSError) as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            if isinstance(error, PermissionError) and file.is_file():
                return tensors  # on Windows: another process has just written the same, and reads it
            advice = "free some space" if error_number(error) in FULL else "see that its folder is writable"
            raise OSError(
                f"The cache {file} could not be written ({error}): {advice}, or name another folder."
            ) from error
        return tensors


def _digest(name: str, tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(name.encode())
    for part, tensor in sorted(tensors.items()):
        digest.update(f"{part} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
