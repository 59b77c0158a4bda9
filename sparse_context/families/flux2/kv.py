"""klein in KV mode: references go through the transformer once a call, and their keys and values are kept."""

import inspect
from typing import Any


def in_kv_mode(pipe: Any) -> Any:
    """The parts of a klein pipeline as `Flux2KleinKVPipeline`. Building it sets the attention processors of KV mode."""
    from diffusers import Flux2KleinKVPipeline

    parts = inspect.signature(Flux2KleinKVPipeline.__init__).parameters
    twin = Flux2KleinKVPipeline(**{name: part for name, part in pipe.components.items() if name in parts})
    path = getattr(pipe.config, "_name_or_path", None)
    twin.register_to_config(_name_or_path=path)  # by which its call settings are found
    return twin
