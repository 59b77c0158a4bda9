"""Where reference tokens enter each kind of pipeline: one file a family, found by the pipeline's class name."""

from collections.abc import Callable, Mapping

from . import flux2, flux3, flux_kontext, qwen_image_edit

FAMILIES: Mapping[str, Callable] = {
    "Flux2Pipeline": flux2.attach,
    "Flux2KleinPipeline": flux2.attach,
    "Flux2KleinKVPipeline": flux2.attach,
    "Flux2KleinInpaintPipeline": flux2.attach,
    "Flux3ModularPipeline": flux3.attach,
    "Flux3DistilledModularPipeline": flux3.attach,
    "FluxKontextPipeline": flux_kontext.attach,
    "FluxKontextInpaintPipeline": flux_kontext.attach,
    "LongCatImageEditPipeline": flux_kontext.attach,
    "QwenImageEditPipeline": qwen_image_edit.attach,
    "QwenImageEditInpaintPipeline": qwen_image_edit.attach,
    "QwenImageEditPlusPipeline": qwen_image_edit.attach,
}


def find_family(pipe: object) -> Callable:
    """The `attach(pipe, context)` of a pipeline's class or of the nearest class that it inherits from.

    Raises TypeError that names the supported pipelines.
    """
    for cls in type(pipe).__mro__:
        if cls.__name__ in FAMILIES:
            return FAMILIES[cls.__name__]
    raise TypeError(
        f"{type(pipe).__name__} is not a pipeline that Sparse Context knows; the supported ones are "
        f"{', '.join(FAMILIES)}"
    )
