"""`sparse-context app`: the web app."""

from typing import Annotated

import typer

from . import options


def app(
    context: typer.Context,
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            help="Folder or hub id. Repeat it to choose between several on the page.",
            show_default="the embedded model",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at.")] = 7860,
    text_model: options.TextModel = None,
    settings: options.SettingsFile = None,
    lora: options.Lora = None,
    lora_scale: options.LoraScale = 1.0,
    kv: options.KV = False,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    cpu_offload: options.CpuOffload = None,
    quantization: options.Quantization = None,
) -> None:
    """Open a page for the browser: references with their kept tokens drawn over them, and dense beside sparse."""
    from dataclasses import replace

    chosen = options.settings_of(context, settings)
    if models and chosen.spec.lora == "overview":
        raise ValueError("lora is 'overview', which the embedded model alone has: leave --lora or --model out.")
    if models and len(models) > 1 and chosen.spec.lora not in (None, "none"):
        raise ValueError(
            f"The LoRA {chosen.spec.lora} is for one model, and there are {len(models)}: name one --model."
        )
    names: list[str | None] = [*models] if models else [chosen.spec.model]
    options.hide_loading_bars()
    from ..app.serve import serve
    from ..families import FAMILIES
    from ..pipelines.hub import class_name_of

    for name in names:
        if name is not None and FAMILIES[class_name_of(name)].paints:
            raise ValueError(f"{name} paints into its first image, and the page has no mask for that: use generate.")

    serve({name or "embedded": replace(chosen.spec, model=name) for name in names}, chosen.request, host, port)
