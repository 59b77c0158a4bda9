"""`sparse-context recommend`: which keep is safe for one's own pictures."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from . import options


def recommend(
    context: typer.Context,
    image: Annotated[
        list[Path] | None, typer.Option(help="Reference image. Repeat it to give several, in order.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Text that says what to make of the references.", show_default="from --settings")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Several scenes, instead of --image: JSONL manifest, data of another trainer, or hub name."),
    ] = None,
    limit: Annotated[int, typer.Option(help="Number of scenes of the data to use, from the first.")] = 8,
    tolerance: Annotated[
        str,
        typer.Option(
            help="How far an image may be from the one with all tokens: same-picture, same-content, or bounds "
            "(psnr=28,st_lpips=0.1)."
        ),
    ] = "same-content",
    keeps: Annotated[
        str | None,
        typer.Option("--keep", help="Ratios to try, separated by commas.", show_default="0.75 down to 0.05"),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--task", help="Task whose rule to try. Repeat it for several.", show_default="edit, global, subject"
        ),
    ] = None,
    overviews: Annotated[
        list[str] | None,
        typer.Option(
            "--overview",
            help="Overview to try, as in generate. Repeat it for several.",
            show_default="none, and those that the weights were trained for, else 4",
        ),
    ] = None,
    model: options.Model = None,
    selector: options.Selector = None,
    phrases: options.Phrases = None,
    text_model: options.TextModel = None,
    overview_layout: options.OverviewLayout = None,
    coverage: options.Coverage = None,
    share: options.Share = "equal",
    floor: options.Floor = 1,
    lora: options.Lora = None,
    lora_scale: options.LoraScale = 1.0,
    kv: options.KV = False,
    seed: options.Seed = 0,
    steps: options.Steps = None,
    height: options.Height = None,
    width: options.Width = None,
    guidance_scale: options.GuidanceScale = None,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    cpu_offload: options.CpuOffload = None,
    quantization: options.Quantization = None,
    settings: options.SettingsFile = None,
    output: Annotated[
        Path,
        typer.Option(
            help="Folder for settings.json, a sheet and everything that was made. Run again into it to go on."
        ),
    ] = Path("recommendation"),
    as_json: options.AsJson = False,
) -> None:
    """Find the fewest tokens that keep your images as they are with all tokens, and say what that saves."""
    from ..images import open_picture
    from ..samples import Sample, read_samples

    if (data is None) == (not image):
        raise ValueError("Say which images to try: pass either --image and --prompt, or --data.")
    if data is not None and prompt is not None:
        raise ValueError("--data has prompts of its own: leave --prompt out.")
    if limit < 1:
        raise ValueError(f"limit is {limit}: pass a number of scenes, 1 or more.")
    chosen = options.settings_of(context, settings)
    if data is not None:
        samples = read_samples(data, needs_image=False)[:limit]
    elif not chosen.request.prompt:
        raise ValueError("Missing option '--prompt': say what to make of the references.")
    else:
        for path in image or []:
            open_picture(path)
        samples = [Sample("scene", chosen.request.prompt, tuple(image or []))]

    from ..config import SparseContextConfig
    from ..evaluation.evaluate import open_folder
    from ..evaluation.recommend import KEEPS, TASKS, recommend
    from ..evaluation.tolerance import find_tolerance
    from ..pipelines.settings import check_references

    if settings is not None and (output / "settings.json").exists() and settings.samefile(output / "settings.json"):
        raise ValueError(f"{settings} would be overwritten by what is recommended: choose another --output.")
    bounds = find_tolerance(tolerance)
    ratios = KEEPS if keeps is None else [_ratio(text) for text in keeps.split(",")]
    factors = None if overviews is None else [options.read_overview(text) for text in overviews]
    SparseContextConfig(keep=ratios, task=tasks or "auto", overview=factors or "trained")  # raises before the work
    for sample in samples:
        check_references(chosen.spec.model, len(sample.references), inpaint=False)
    options.hide_loading_bars()
    open_folder(output)

    def say(text: str) -> None:
        if not as_json:
            print(text, flush=True)

    say(str(bounds))
    try:
        found = recommend(
            chosen, samples, bounds, output, keeps=ratios, tasks=tasks or TASKS, overviews=factors, say=say
        )
    except KeyboardInterrupt:
        print("\nStopped. Run the same command again to continue.", file=sys.stderr)
        raise
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
        return
    print(found)
    print(f"wrote {', '.join(str(output / name) for name in ('settings.json', 'sheet.png', 'recommendation.json'))}")


def _ratio(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"keep is {text!r}: pass ratios such as 0.5,0.2,0.1.") from None
