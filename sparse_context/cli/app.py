"""`sparse-context app`: the web app."""

from typing import Annotated

import typer

from . import options


def app(
    model: Annotated[
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
    lora: options.Lora = None,
    lora_scale: options.LoraScale = 1.0,
    kv: options.KV = False,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    cpu_offload: options.CpuOffload = None,
    quantization: options.Quantization = None,
) -> None:
    """Open a page in the browser: references with their kept tokens, and dense beside sparse."""
    from ..app.serve import serve
    from ..pipelines.spec import ModelSpec

    specs = {
        name or "the embedded model": ModelSpec(name, dtype, device, cpu_offload, lora, lora_scale, kv, quantization)
        for name in model or [None]
    }
    options.hide_loading_bars()
    serve(specs, host, port)
