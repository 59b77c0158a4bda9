"""What is known of each kind of pipeline: a folder a family, found by the pipeline's class name in one table.

    drop.py     `attach(pipe, call)`: where reference tokens enter, and are cut
    call.py     `arguments(...)` (call.py here): how a call hands over its images; modular pipelines share modular.py's;
                `decode(...)`: pictures of latents; `fit(...)`: references in the size that the model sees; optional
    train.py    a `Host` (host.py), by which the trainer encodes and predicts; optional
    bench.py    `SHAPES` (shape.py): the sizes of real models, by the names of the benchmark; optional, without torch

A new family is a folder with its drop.py and, unless its pipelines are modular, its call.py, and a line in `FAMILIES`
for each of its pipeline classes.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .host import Host


@dataclass(frozen=True)
class Family:
    """What is known of a pipeline class before it is loaded.

    folder: the family's, below this package.
    drop: its module whose `attach(pipe, call)` knows where reference tokens enter.
    host: the class in its train.py that trains it; None where it cannot be trained.
    fewest, most: how many references a call takes (most None: the pipeline sets no limit).
    modular: whether it is made of blocks; its index is then `modular_model_index.json`.
    paints: whether it paints into its first picture, where a mask says so.
    guidance: its argument for the strength of classifier-free guidance.
    kv: whether references go through its model once a call, and their keys and values are kept.
    batch: whether one call answers several prompts about the same references, each from noise of its own.
    narrow: whether it refuses pictures with a side under 64 pixels or of a shape beyond 8:1.
    """

    folder: str
    drop: str = "drop"
    host: str | None = None
    fewest: int = 0
    most: int | None = None
    modular: bool = False
    paints: bool = False
    guidance: str = "guidance_scale"
    kv: bool = False
    batch: bool = False
    narrow: bool = False


_flux2 = partial(Family, "flux2", narrow=True)
_flux2_modular = partial(_flux2, "modular", modular=True)
_flux3 = partial(Family, "flux3", most=10, modular=True)
_kontext = partial(Family, "kontext", most=1)
_qwen = partial(Family, "qwen", fewest=1, guidance="true_cfg_scale")


FAMILIES: Mapping[str, Family] = {
    "Flux2Pipeline": _flux2(host="Flux2"),
    "Flux2KleinPipeline": _flux2(host="Flux2", batch=True),
    "Flux2KleinKVPipeline": _flux2(host="Flux2", kv=True, batch=True),
    "Flux2KleinInpaintPipeline": _flux2(fewest=1, paints=True),
    "Flux2ModularPipeline": _flux2_modular(),
    "Flux2KleinModularPipeline": _flux2_modular(),
    "Flux2KleinBaseModularPipeline": _flux2_modular(),
    "Flux3ModularPipeline": _flux3(host="Flux3"),
    "Flux3DistilledModularPipeline": _flux3(),
    "FluxKontextPipeline": _kontext(host="Kontext"),
    "FluxKontextInpaintPipeline": _kontext(fewest=1, paints=True),
    "LongCatImageEditPipeline": _kontext(fewest=1),
    "QwenImageEditPipeline": _qwen(most=1),
    "QwenImageEditInpaintPipeline": _qwen(most=1, paints=True),
    "QwenImageEditPlusPipeline": _qwen(host="QwenImageEditPlus"),
}


def family_of(pipe: object) -> Family:
    """The entry of a pipeline's class or of the nearest class that it inherits from.

    Raises TypeError that names the supported pipelines.
    """
    family = _find_family(pipe)
    if family is None:
        raise TypeError(
            f"{type(pipe).__name__} is not a pipeline that Sparse Context knows; the supported ones are "
            f"{', '.join(FAMILIES)}"
        )
    return family


def _find_family(pipe: object) -> Family | None:
    return next((FAMILIES[cls.__name__] for cls in type(pipe).__mro__ if cls.__name__ in FAMILIES), None)


def find_attach(pipe: object) -> Callable:
    """The `attach(pipe, call)` of a pipeline's family. Raises TypeError as `family_of` does."""
    family = family_of(pipe)
    return import_module(f".{family.folder}.{family.drop}", __name__).attach


def find_host(pipe: Any, settings: Mapping[str, Any], kv: bool = False) -> "Host":
    """What trains a pipeline, by its family (`family_of`). Raises ValueError that names those that can be trained.

    settings: what the model wants of a call, for encoding prompts (`pipelines.settings.call_settings`). kv: asks for KV
    mode; raises ValueError where the family has none.
    """
    family = _find_family(pipe)
    if family is None or family.host is None:
        trained = ", ".join(name for name, known in FAMILIES.items() if known.host is not None)
        raise ValueError(f"{type(pipe).__name__} cannot be trained here; the pipelines that can are {trained}.")
    train = import_module(f".{family.folder}.train", __name__)
    return getattr(train, family.host)(pipe, settings, kv)


def bench_modules() -> Iterator[ModuleType]:
    """The bench.py of each family that has one, in the order of `FAMILIES`."""
    for folder in dict.fromkeys(family.folder for family in FAMILIES.values()):
        if find_spec(f".{folder}.bench", __name__) is not None:
            yield import_module(f".{folder}.bench", __name__)
