"""Options that several commands share, and what their texts come to."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..texts import read_keep, read_overview, read_selector

if TYPE_CHECKING:
    from PIL import Image

    from ..config import SparseContextConfig
    from ..pipelines.settings_file import Settings

TEXTS = ("keep", "selector", "overview", "task", "phrases")
"""Options that are read from texts, one for all references or one for each."""

NO_MASK = Path("none")
NO_PHRASE = "none"

Model = Annotated[
    str | None, typer.Option("--model", "-m", help="Folder or hub id.", show_default="the embedded model")
]
Keep = Annotated[
    list[str] | None,
    typer.Option(
        help="Ratio (0.2; 1 keeps all), count (400) or auto. Repeat it to give one per reference.", show_default="0.2"
    ),
]
Selector = Annotated[
    list[str] | None,
    typer.Option(
        help="auto, a name (random, uniform, edges, detail, saliency, subject, contrast, residual, mask, text) or a "
        "blend (saliency=0.7,edges=0.3). Repeat it to give one per reference.",
        show_default="auto",
    ),
]
Task = Annotated[
    list[str] | None,
    typer.Option(
        help="edit, global, subject or auto. Sets the selector and coverage that you leave out. Repeat it to give one "
        "per reference.",
        show_default="auto",
    ),
]
Overview = Annotated[
    list[str] | None,
    typer.Option(
        help="Small copy of each reference beside the kept tokens, counted with them: the factor it is smaller by (4), "
        "auto, trained (what the weights were trained for) or none. Repeat it to give one per reference.",
        show_default="trained",
    ),
]
OverviewLayout = Annotated[
    str | None,
    typer.Option(
        help="Where an overview lies: spread over its reference, or as one more reference.",
        show_default="as trained, else reference",
    ),
]
ReferenceMaxPixels = Annotated[
    int | None,
    typer.Option(
        help="Take sharp tokens from references of up to so many pixels, where the model scales them down; with an "
        "overview.",
        show_default="the model's own size",
    ),
]
Mask = Annotated[
    list[Path] | None,
    typer.Option(
        help="Image of the reference's size, white where to keep. Give one per reference, in order; the word none for "
        "a reference without."
    ),
]
Phrases = Annotated[
    list[str] | None,
    typer.Option(
        "--text",
        help='What you mean in a reference, such as "the red car". A subject keeps it, an edit keeps all else. Repeat '
        "it to give one per reference, in order; the word none for a reference without.",
    ),
]
TextModel = Annotated[
    str | None,
    typer.Option(
        help="Model that finds what --text says: folder or hub id of a CLIPSeg, OWLv2, Grounding DINO or SAM 3.",
        show_default="CLIPSeg, if it is in the hub's cache",
    ),
]
Coverage = Annotated[
    float | None, typer.Option(help="Share of the kept tokens to spread evenly, 0 to 1.", show_default="by task")
]
Merge = Annotated[float, typer.Option(help="Share of the kept tokens to replace by averages of the others, 0 to 1.")]
Share = Annotated[
    str,
    typer.Option(help="How references share one ratio or count. equal: the same for each. joint: they compete for it."),
]
Floor = Annotated[int, typer.Option(help="Fewest tokens per reference, as far as a count allows.")]
Lora = Annotated[
    str | None,
    typer.Option(
        help="LoRA for this model, as a safetensors file, or the word none; of the embedded model also overview.",
        show_default="the model's own, if it has one",
    ),
]
LoraScale = Annotated[float, typer.Option(help="LoRA strength: 0.5 applies half of its change.")]
KV = Annotated[
    bool,
    typer.Option("--kv", help="Run references through the model only once (FLUX.2 klein, with a LoRA of train --kv)."),
]
Seed = Annotated[int, typer.Option(help="Random seed of the image noise.")]
Steps = Annotated[int | None, typer.Option(help="Denoise steps.", show_default="the model's")]
Height = Annotated[int | None, typer.Option(help="Output height in pixels.", show_default="the model's")]
Width = Annotated[int | None, typer.Option(help="Output width in pixels.", show_default="the model's")]
GuidanceScale = Annotated[
    float | None, typer.Option(help="Strength of classifier-free guidance.", show_default="the model's")
]
Dtype = Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...", show_default="the best available")]
CpuOffload = Annotated[
    str | None, typer.Option(help="Keep weights in CPU memory until they are used: model or group.", show_default="no")
]
Quantization = Annotated[
    str | None,
    typer.Option(
        help="Quantised weights of the transformer: int8 (torchao), nf4 (bitsandbytes), int8-bnb (bitsandbytes, "
        "needs a GPU), or the path of a .gguf file.",
        show_default="none",
    ),
]
Vae = Annotated[
    str | None,
    typer.Option(
        help="How the VAE runs: channels-last, or compiled (slow at the first call). Changes the last digits.",
        show_default="as loaded",
    ),
]
SettingsFile = Annotated[
    Path | None,
    typer.Option("--settings", help="JSON file of settings, as recommend writes it. Options that you give go before."),
]
Ray = Annotated[
    bool,
    typer.Option(
        "--ray", help="Use Ray: the cluster that RAY_ADDRESS names, else one that is started on this machine."
    ),
]
Gpus = Annotated[float, typer.Option(help="With --ray: GPUs for each process; 0.5 shares one between two.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]
ConfigName = Annotated[str | None, typer.Option(help="Configuration of a data set that has several.")]
Split = Annotated[str, typer.Option(help="Split of a data set.")]
ImageColumn = Annotated[str, typer.Option(help="Column of the target image.")]
CondImageColumn = Annotated[str, typer.Option(help="Column of the reference, or of a list of references.")]
CaptionColumn = Annotated[str, typer.Option(help="Column of the prompt.")]


def settings_of(
    context: typer.Context,
    file: Path | None,
    references: "Sequence[Image.Image] | None" = None,
    mask: Sequence[Path] | None = None,
) -> "Settings":
    """What the options of a command say, over what a file of settings says, over the defaults.

    An option counts where its parameter has the name of a setting. references: those of the call; None: they are not
    known yet. mask: what is to be kept of each. Raises ValueError for values that do not fit.
    """
    from ..pipelines.settings_file import CALL_KEYS, CONFIG_KEYS, MODEL_KEYS, Settings, read_settings

    given = {name: context.params[name] for name in context.params if _is_given(context, name)}
    base = Settings() if file is None else read_settings(file)

    def among(keys: Sequence[str]) -> dict[str, Any]:
        return {name: given[name] for name in keys if name in given}

    config = selection_config(
        mask=mask, references=references, base=base.request.config, **dict.fromkeys(TEXTS) | among(CONFIG_KEYS)
    )
    return Settings(replace(base.spec, **among(MODEL_KEYS)), replace(base.request, config=config, **among(CALL_KEYS)))


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def selection_config(
    keep: Sequence[str] | None,
    selector: Sequence[str] | None,
    mask: Sequence[Path] | None,
    references: "Sequence[Image.Image] | None",
    overview: Sequence[str] | None = None,
    task: Sequence[str] | None = None,
    phrases: Sequence[str] | None = None,
    base: "SparseContextConfig | None" = None,
    **settings: Any,
) -> "SparseContextConfig":
    """What to keep of these references; None: they are not known yet. base: what holds where nothing is said; None: the
    defaults. settings: other fields of the config, such as coverage.

    Raises ValueError for values that do not fit, and PictureError for a mask that cannot be used.
    """
    from ..config import SparseContextConfig
    from ..images import open_mask
    from ..selectors.masks import mask as masks_of
    from ..selectors.registry import each_selector

    repeated = {"--keep": keep, "--selector": selector, "--overview": overview, "--task": task, "--text": phrases}
    for option, values in repeated.items():
        if values and references is not None and len(values) not in (1, len(references)):
            raise ValueError(
                f"{option} has {len(values)} values for {len(references)} references: give one, or as many."
            )
    base = base or SparseContextConfig()
    if keep:
        settings["keep"] = _one_or_all([read_keep(text) for text in keep])
    if overview:
        settings["overview"] = _one_or_all([read_overview(text) for text in overview])
    if task:
        settings["task"] = _one_or_all([*task])
    if phrases:
        settings["phrases"] = _one_or_all([None if text == NO_PHRASE else text for text in phrases])
    selectors = [read_selector(text) for text in selector] if selector else each_selector(base.selector, 1)
    if mask:
        count = len(references or ())
        if len(mask) != count:
            raise ValueError(f"There are {len(mask)} masks for {count} references: pass one --mask for each.")
        masks = [
            None if path == NO_MASK else open_mask(path, reference.size)
            for path, reference in zip(mask, references or (), strict=True)
        ]
        if None in masks and len(selectors) == 1:
            selectors = selectors * count
        groups = [masks] if len(selectors) == 1 else [[each] for each in masks]
        if len(groups) != len(selectors):
            raise ValueError(f"There are {len(selectors)} selectors for {count} references: give one, or as many.")
        selectors = [
            selector if group == [None] else _with_masks(selector, masks_of(group))
            for selector, group in zip(selectors, groups, strict=True)
        ]
    return replace(base, selector=_one_or_all(selectors), **settings)


def _one_or_all(values: list[Any]) -> Any:
    return values[0] if len(values) == 1 else values


def _with_masks(selector: Any, user_mask: Any) -> Any:
    """`--mask` alone selects by the mask; beside a selector it stands for the part of it that is named mask."""
    if selector is None or selector == "mask":
        return user_mask
    if isinstance(selector, dict) and "mask" in selector:
        return {user_mask if name == "mask" else name: weight for name, weight in selector.items()}
    raise ValueError("--mask was given, but --selector does not use it: name mask there, or leave one of the two out.")


def check_distinct(files: Mapping[str, Path | None]) -> None:
    """Raise ValueError where two of these options name the same file."""
    places = [os.path.normcase(os.path.realpath(path)) for path in files.values() if path is not None]
    if len(set(places)) < len(places):
        *names, last = files
        raise ValueError(f"Two of {', '.join(names)} and {last} name the same file: give each its own.")


def check_outputs(outputs: Sequence[Path], inputs: Sequence[Path]) -> None:
    """Raise ValueError where an output cannot be written, or would be written over an image that is read."""
    from ..images import check_output

    for output in outputs:
        check_output(output)
        for source in inputs:
            if output.exists() and source.exists() and output.samefile(source):
                raise ValueError(f"{output} is also an input and would be overwritten: name another output file.")


def hide_loading_bars() -> None:
    """Leave stderr to the bars of the steps and of downloads."""
    from ..pipelines.load import hide_loading_bars

    hide_loading_bars()
