"""Where reference tokens enter each kind of pipeline: one folder a family, found by the pipeline's class name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module


@dataclass(frozen=True)
class Family:
    """What is known of a pipeline class before it is loaded.

    file: the module below this package whose `attach(pipe, call)` knows where its reference tokens enter.
    fewest, most: how many references a call takes (most None: the host sets no limit).
    modular: whether it is made of blocks; its index is then `modular_model_index.json`.
    paints: whether it paints into its first picture, where a mask says so.
    guidance: its argument for the strength of classifier-free guidance.
    narrow: whether it refuses pictures with a side under 64 pixels or of a shape beyond 8:1.
    """

    file: str
    fewest: int = 0
    most: int | None = None
    modular: bool = False
    paints: bool = False
    guidance: str = "guidance_scale"
    narrow: bool = False


_flux2 = partial(Family, "flux2.drop", narrow=True)
_flux2_modular = partial(Family, "flux2.modular", modular=True, narrow=True)
_flux3 = partial(Family, "flux3.drop", most=10, modular=True)
_flux_kontext = partial(Family, "kontext.drop", most=1)
_qwen_image_edit = partial(Family, "qwen.drop", fewest=1, guidance="true_cfg_scale")


FAMILIES: Mapping[str, Family] = {
    "Flux2Pipeline": _flux2(),
    "Flux2KleinPipeline": _flux2(),
    "Flux2KleinKVPipeline": _flux2(),
    "Flux2KleinInpaintPipeline": _flux2(fewest=1, paints=True),
    "Flux2ModularPipeline": _flux2_modular(),
    "Flux2KleinModularPipeline": _flux2_modular(),
    "Flux2KleinBaseModularPipeline": _flux2_modular(),
    "Flux3ModularPipeline": _flux3(),
    "Flux3DistilledModularPipeline": _flux3(),
    "FluxKontextPipeline": _flux_kontext(),
    "FluxKontextInpaintPipeline": _flux_kontext(fewest=1, paints=True),
    "LongCatImageEditPipeline": _flux_kontext(fewest=1),
    "QwenImageEditPipeline": _qwen_image_edit(most=1),
    "QwenImageEditInpaintPipeline": _qwen_image_edit(most=1, paints=True),
    "QwenImageEditPlusPipeline": _qwen_image_edit(),
}


def family_of(pipe: object) -> Family:
    """The entry of a pipeline's class or of the nearest class that it inherits from.

    Raises TypeError that names the supported pipelines.
    """
    for cls in type(pipe).__mro__:
        if cls.__name__ in FAMILIES:
            return FAMILIES[cls.__name__]
    raise TypeError(
        f"{type(pipe).__name__} is not a pipeline that Sparse Context knows; the supported ones are "
        f"{', '.join(FAMILIES)}"
    )


def find_family(pipe: object) -> Callable:
    """The `attach(pipe, call)` of a pipeline's family. Raises TypeError as `family_of` does."""
    return import_module(f".{family_of(pipe).file}", __name__).attach
