"""`sparse-context serve`: one pipeline behind HTTP, as the official `openai` client calls it."""

import math
import os
from pathlib import Path
from typing import Annotated

import typer

from ..server import KEY_VARIABLE
from . import options

CALL = ("steps", "height", "width", "guidance_scale", "negative_prompt")
"""Of a request: what a file of settings may say for clients that do not. Prompts and seeds are the clients' own."""


def serve(
    context: typer.Context,
    host: Annotated[str, typer.Option(help="Address to listen on. Another than loopback needs a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes any that is free.")] = 8000,
    model: options.Model = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="The model's id for clients.", show_default="its folder's or hub name")
    ] = None,
    keep: options.Keep = None,
    keep_high: Annotated[str, typer.Option(help="Budget where a client asks for input_fidelity high.")] = "0.5",
    selector: options.Selector = None,
    task: options.Task = None,
    overview: options.Overview = None,
    overview_layout: options.OverviewLayout = None,
    coverage: options.Coverage = None,
    text_model: options.TextModel = None,
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
    settings: options.SettingsFile = None,
    ray: options.Ray = False,
    replicas: Annotated[
        int, typer.Option(help="With --ray: processes with the model loaded, one call at a time each.")
    ] = 1,
    max_replicas: Annotated[
        int | None, typer.Option(help="With --ray: as many replicas under load.", show_default="as many as --replicas")
    ] = None,
    gpus: options.Gpus = 0.0,
    ray_config: Annotated[
        Path | None, typer.Option(help="Write a Serve config file for a Ray cluster, and serve nothing.")
    ] = None,
) -> None:
    """Serve a model over HTTP: POST /v1/images/edits as the official openai client calls it. What to keep, and the
    steps, are for clients that do not say."""
    from ..server.settings import Settings

    chosen = options.settings_of(context, settings)
    if cache < 0:
        raise ValueError(f"--cache is {cache}: pass MiB, or 0 for none.")
    for option, number in (("--max-body", max_body), ("--max-references", max_references)):
        if number < 1:
            raise ValueError(f"{option} is {number}: pass 1 or more.")
    call = {name: getattr(chosen.request, name) for name in CALL}
    bounds = Settings(
        name=served_model_name or _name(chosen.spec.model),
        config=chosen.request.config,
        keep_high=_keep_high(keep_high),
        call={name: value for name, value in call.items() if value is not None},
        api_key=_key(api_key_file),
        host=host,
        body=max_body * 2**20,
        references=max_references,
        pixels=_pixels("max-megapixels", max_megapixels),
        output_pixels=_pixels("max-output-megapixels", max_output_megapixels),
        queue=queue,
        deadline=deadline,
        batch=_batch(batch),
    )

    if not ray and ray_config is None:
        for option, given in (("--replicas", replicas != 1), ("--max-replicas", max_replicas), ("--gpus", gpus)):
            if given:
                raise ValueError(f"{option} is for replicas on Ray: pass --ray too, or leave it out.")
    options.hide_loading_bars()
    if ray or ray_config is not None:
        from ..batch.runner import threads_of
        from ..layers import require
        from ..server import on_ray

        require("ray")
        fleet = on_ray.Replicas(replicas, max_replicas, threads_of(max(1, max_replicas or replicas)), gpus, cache)
        if ray_config is None:
            return on_ray.run(chosen.spec, bounds, port, fleet)
        if ray_config.exists():
            raise ValueError(f"{ray_config} is there and would be overwritten: give --ray-config another name.")
        on_ray.write_config(ray_config, chosen.spec, bounds, port, fleet)
        print(f"wrote {ray_config}: serve deploy {ray_config}")
        return
    from ..cache import ReferenceCache
    from ..pipelines.engine import Engine
    from ..server.run import run

    run(Engine(chosen.spec, bar=False, cache=ReferenceCache(cache * 2**20) if cache else None), bounds, port)


def _keep_high(text: str) -> float | int | str:
    """A budget. Raises ValueError, under the option's own name, for one that is none."""
    from ..config import SparseContextConfig

    try:
        keep = options.read_keep(text)
        SparseContextConfig(keep=keep)
    except ValueError as error:
        raise ValueError(f"--keep-high: {error}") from None
    return keep


def _pixels(option: str, megapixels: float) -> int:
    """Megapixels as pixels, 1 or more. Raises ValueError for no such number."""
    if not 1e-6 <= megapixels < math.inf:
        raise ValueError(f"--{option} is {megapixels:g}: pass a number above 0, of a pixel at least (0.000001).")
    return round(megapixels * 1e6)


def _name(model: str | None) -> str:
    """What clients call a model: a hub id as it is, of a folder its last name, for its place is nobody's business."""
    if model is None:
        return "sparse-context-embedded"
    return Path(model).resolve().name if Path(model).exists() else model


def _key(file: Path | None) -> str | None:
    try:
        text = os.environ.get(KEY_VARIABLE, "") if file is None else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ValueError(f"--api-key-file {file} cannot be read ({reason}): name a text file with the key.") from None
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
