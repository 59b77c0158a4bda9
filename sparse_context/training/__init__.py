"""Fine-tuning with dropped reference tokens: `TrainConfig` says how to train, `RunConfig` on what and where.

    from sparse_context.training import RunConfig, TrainConfig
    from sparse_context.training.launch import launch

    launch(None, "train.jsonl", Path("my-lora"), TrainConfig(rank=16), RunConfig(resolution=512))

The names below are loaded when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import TrainConfig as TrainConfig
    from .options import RunConfig as RunConfig

_HOME = {"RunConfig": "options", "TrainConfig": "config"}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
