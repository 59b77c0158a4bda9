"""Which family of pipelines is trained by which class."""

from collections.abc import Callable, Mapping
from typing import Any

from ..families.flux2.train import Flux2
from ..families.flux3.train import Flux3
from ..families.host import Host
from ..families.kontext.train import Kontext
from ..families.qwen.train import QwenImageEditPlus

HOSTS: Mapping[str, Callable[[Any, bool], Host]] = {
    "Flux2Pipeline": Flux2,
    "Flux2KleinPipeline": Flux2,
    "Flux2KleinKVPipeline": Flux2,
    "FluxKontextPipeline": Kontext,
    "QwenImageEditPlusPipeline": QwenImageEditPlus,
    "Flux3ModularPipeline": Flux3,
}


def find_host(pipe: Any, kv: bool = False) -> Host:
    """The host of a pipeline, by its class. Raises ValueError that names the pipelines that can be trained.

    `kv` asks for KV mode; a host whose family has none raises ValueError.
    """
    name = type(pipe).__name__
    if name not in HOSTS:
        raise ValueError(f"{name} cannot be trained here; the pipelines that can are {', '.join(HOSTS)}.")
    return HOSTS[name](pipe, kv)
