"""`sparse-context generate`: references and a prompt in, an image out."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from . import options


def generate(
    context: typer.Context,
    prompt: Annotated[
        str | None, typer.Option(help="Text that says what to make of the references.", show_default="from --settings")
    ] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="Reference image. Repeat it to give several, in order.")
    ] = None,
    model: options.Model = None,
    keep: options.Keep = None,
    selector: options.Selector = None,
    task: options.Task = None,
    mask: options.Mask = None,
    phrases: options.Phrases = None,
    text_model: options.TextModel = None,
    overview: options.Overview = None,
    overview_layout: options.OverviewLayout = None,
    reference_max_pixels: options.ReferenceMaxPixels = None,
    coverage: options.Coverage = None,
    merge: options.Merge = 0.0,
    share: options.Share = "equal",
    floor: options.Floor = 1,
    output: Annotated[Path, typer.Option(help="Output file: .png, .jpg or .webp.")] = Path("out.png"),
    show_tokens: Annotated[Path | None, typer.Option(help="Also draw the kept tokens into this file.")] = None,
    compare: Annotated[
        Path | None, typer.Option(help="Also run with all tokens, and write both images side by side into this file.")
    ] = None,
    inpaint: Annotated[
        Path | None, typer.Option(help="Mask for inpainting models: white where to paint in the first reference.")
    ] = None,
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
    vae: options.Vae = None,
    settings: options.SettingsFile = None,
    as_json: options.AsJson = False,
) -> None:
    """Generate an image from references and a prompt, with a fraction of the reference tokens."""
    from ..images import open_mask, open_picture, save_picture

    outputs = [path for path in (output, show_tokens, compare) if path is not None]
    options.check_outputs(outputs, [*(image or []), *(mask or []), *([inpaint] if inpaint else [])])
    options.check_distinct({"--output": output, "--show-tokens": show_tokens, "--compare": compare})
    references = [open_picture(path) for path in image or []]
    if show_tokens is not None and not references:
        raise ValueError("--show-tokens draws on the references, but there are none: pass --image.")
    if inpaint is not None and not references:
        raise ValueError("--inpaint says where to paint in the first reference, but there is none: pass --image.")
    chosen = options.settings_of(context, settings, references, mask)
    if prompt is None and not chosen.request.prompt:
        raise ValueError("Missing option '--prompt': say what to make of the references.")

    options.hide_loading_bars()
    from ..pipelines.engine import Engine
    from ..pipelines.settings import check_references
    from ..preview import draw_selection

    painted = None if inpaint is None else open_mask(inpaint, references[0].size)
    request = replace(chosen.request, references=references, inpaint=painted)
    check_references(chosen.spec.model, len(references), inpaint is not None)
    engine = Engine(chosen.spec)
    comparison = None if compare is None else engine.compare(request)
    result = engine(request) if comparison is None else comparison.sparse

    save_picture(result.image, output)
    if show_tokens is not None and result.selection is not None:
        save_picture(draw_selection(result.selection), show_tokens)
    if compare is not None and comparison is not None:
        save_picture(comparison.draw(), compare)
    if as_json:
        report = {"output": str(output), **result.to_dict()}
        print(json.dumps(report | ({} if comparison is None else {"dense": comparison.dense.to_dict()}), indent=2))
        return
    print(result.selection or "no references")
    print(f"took {result.times}")
    if comparison is not None:
        print(f"with all tokens {comparison.dense.times}: {comparison.speedup:.2f} times as long")
    print(f"wrote {', '.join(map(str, outputs))}")
