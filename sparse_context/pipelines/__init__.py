"""Pipelines that answer requests: `ModelSpec` says which one, `Request` what to generate, `Engine` does it.

    engine = Engine(ModelSpec("black-forest-labs/FLUX.2-klein-4B"))
    result = engine(Request("the cat on the sofa", [cat, sofa], SparseContextConfig(keep=0.2)))

The names below are loaded when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine import Comparison as Comparison
    from .engine import Engine as Engine
    from .engine import Generation as Generation
    from .errors import Cancelled as Cancelled
    from .errors import GenerationError as GenerationError
    from .spec import ModelSpec as ModelSpec
    from .spec import Request as Request

_HOME = {
    "Cancelled": "errors",
    "Comparison": "engine",
    "Engine": "engine",
    "Generation": "engine",
    "GenerationError": "errors",
    "ModelSpec": "spec",
    "Request": "spec",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
