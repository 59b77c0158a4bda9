"""`sparse-context serve`: one pipeline behind HTTP, as the official `openai` client calls it."""

import os
from pathlib import Path
from typing import Annotated

import typer

from . import options

KEY_VARIABLE = "SPARSE_CONTEXT_API_KEY"


def serve(
    host: Annotated[str, typer.Option(help="Address to listen on. Another than loopback needs a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes any that is free.")] = 8000,
    model: options.Model = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="The model's id for clients.", show_default="its folder's or hub name")
    ] = None,
    keep: Annotated[str, typer.Option(help="Budget where a client names none: ratio, count or auto.")] = "0.2",
    keep_high: Annotated[str, typer.Option(help="Budget where a client asks for input_fidelity high.")] = "0.5",
    selector: Annotated[
        str | None, typer.Option(help="Selector where a client names none, or a blend.", show_default="auto")
    ] = None,
    task: Annotated[str, typer.Option(help="Task where a client names none.")] = "auto",
    overview: Annotated[
        str, typer.Option(help="Overview where a client says nothing: a factor, auto, trained, none.")
    ] = ("trained"),
    coverage: options.Coverage = None,
    steps: options.Steps = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(help="File that holds the API key.", show_default=f"${KEY_VARIABLE}, else no key"),
    ] = None,
    queue: Annotated[int, typer.Option(help="Requests that may wait. More are told to come again.")] = 16,
    deadline: Annotated[float, typer.Option(help="Seconds in which a request is answered or given up.")] = 300.0,
    batch: Annotated[
        str,
        typer.Option(help="Most pictures of one call, for requests about the same images; auto tries what is fastest."),
    ] = "auto",
    cache: Annotated[int, typer.Option(help="MiB for images that come again; 0 remembers none.")] = 256,
    max_body: Annotated[int, typer.Option(help="MiB of a request.")] = 64,
    max_references: Annotated[int, typer.Option(help="Images of a request.")] = 10,
    max_megapixels: Annotated[float, typer.Option(help="Of each image that is sent.")] = 40.0,
    max_output_megapixels: Annotated[float, typer.Option(help="Of each picture that is made.")] = 4.2,
    lora: options.Lora = None,
    lora_scale: options.LoraScale = 1.0,
    kv: options.KV = False,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    cpu_offload: options.CpuOffload = None,
    quantization: options.Quantization = None,
) -> None:
    """Serve a model over HTTP: POST /v1/images/edits as the official openai client calls it."""
    from ..pipelines.spec import ModelSpec
    from ..server.settings import Settings

    settings = Settings(
        name=served_model_name or _name(model),
        config=options.selection_config(
            [keep], None if selector is None else [selector], None, [], [overview], task=task, coverage=coverage
        ),
        keep_high=options.read_keep(keep_high),
        steps=steps,
        api_key=_key(api_key_file),
        host=host,
        body=max_body * 2**20,
        references=max_references,
        pixels=round(max_megapixels * 1e6),
        output_pixels=round(max_output_megapixels * 1e6),
        queue=queue,
        deadline=deadline,
        batch=_batch(batch),
    )
    spec = ModelSpec(model, dtype, device, cpu_offload, lora, lora_scale, kv, quantization)

    options.hide_loading_bars()
    from ..cache import ReferenceCache
    from ..pipelines.engine import Engine
    from ..server.run import run

    run(Engine(spec, bar=False, cache=ReferenceCache(cache * 2**20) if cache else None), settings, port)


def _name(model: str | None) -> str:
    """What clients call a model: a hub id as it is, of a folder its last name, for its place is nobody's business."""
    if model is None:
        return "sparse-context-embedded"
    return Path(model).resolve().name if Path(model).exists() else model


def _key(file: Path | None) -> str | None:
    text = os.environ.get(KEY_VARIABLE, "") if file is None else file.read_text(encoding="utf-8")
    if file is not None and not text.strip():
        raise ValueError(f"The file {file} holds no API key: write one of 16 characters or more into it.")
    return text.strip() or None


def _batch(text: str) -> int | None:
    if text == "auto":
        return None
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"batch is {text!r}: pass a number of pictures, or auto.") from None
