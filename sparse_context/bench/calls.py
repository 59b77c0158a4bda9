"""Whole calls, timed turn by turn."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from PIL import Image

from ..config import SparseContextConfig
from ..families.flux2.bench import shape_of
from ..families.shape import Tokens
from ..pipelines.settings import call_settings, reference_sides
from ..pipelines.timing import Times, now, timed
from ..preview import fit_reference
from .config import BenchConfig
from .methods import METHODS, Pipes, make_pipes
from .report import REPORTED, TIMED, compare
from .turns import take_turns, watch_tokens


def bench(pipe: Any, pictures: Sequence[Image.Image], prompt: str, config: BenchConfig) -> dict[str, Any]:
    """Whole calls of `pipe`, a FLUX.2 klein or dev of any size; returns the figures.

    `pictures` are the references, used again from the first where there are too few. Where `pipe` has no text encoder,
    the prompt's embeddings are drawn, and encoding the text takes no time. Raises ValueError for what the model does
    not take.
    """
    if type(pipe).__name__ not in TIMED:
        raise ValueError(f"The model is a {type(pipe).__name__}; the benchmark takes {' and '.join(TIMED)}.")
    settings = call_settings(pipe)
    most, token = settings.get("max_references"), 2 * pipe.vae_scale_factor
    if most is not None and max(config.references) > most:
        raise ValueError(f"references is {max(config.references)}, and this model takes at most {most}: pass fewer.")
    sizes = config.size or (settings.get("height") or 1024,)
    for size in sizes:
        if size % token:
            raise ValueError(f"size is {size}: this model makes multiples of {token}.")
    pipes = make_pipes(pipe)
    methods = config.methods or [m for m in METHODS if pipes.kv is not None or not METHODS[m].kv]
    if pipes.kv is None and any(METHODS[method].kv for method in methods):
        raise ValueError(f"{type(pipe).__name__} has no pipeline that reuses keys and values: leave out kv, sparse_kv.")
    arguments = _arguments(pipe, settings, prompt, config.steps)
    steps = arguments["num_inference_steps"]
    groups = []
    for size in sizes:
        for count in config.references:
            chosen = [pictures[i % len(pictures)].convert("RGB") for i in range(count)]
            if settings.get("reference_size") is None:
                references = [picture.resize((size, size), Image.Resampling.LANCZOS) for picture in chosen]
            else:
                sides = reference_sides(settings["reference_size"], SparseContextConfig(), count)
                references = [fit_reference(*pair) for pair in zip(chosen, sides, strict=True)]
            groups.append((size, count, references))

    jobs, rows = [], []
    for size, count, references in groups:
        for method, keep in config.cells(methods):
            call = arguments | {"height": size, "width": size}
            row: dict[str, Any] = {"size": size, "references": count, "method": method, "keep": keep}

            def run(first: bool, row=row, references=references, call=call) -> Times:
                given = METHODS[row["method"]].prepare, references, 0.0 if row["keep"] is None else row["keep"]
                if not first:
                    return _call(pipes, *given, call)
                row["memory"] = {}
                seen: list[Tokens] = []
                watched = [watch_tokens(each.transformer, seen, row["size"] // token) for each in pipes.all()]
                try:
                    times = _call(pipes, *given, call, row["memory"])
                finally:
                    for hook in watched:
                        hook.remove()
                row["tokens"] = asdict(seen[0])
                return times

            jobs.append(run)
            rows.append(row)
    turns = take_turns(jobs, config)
    for row, times in zip(rows, turns, strict=True):
        row["seconds"] = {name: [getattr(each, name) for each in times] for name in REPORTED}
    shape = shape_of(pipe.transformer, token, rows[0]["tokens"]["text"], steps)
    return {"turns": len(turns[0]), "steps": steps, "rows": compare(rows, shape)}


def _arguments(pipe: Any, settings: dict, prompt: str, steps: int | None) -> dict[str, Any]:
    """What every call is given, whatever the method."""
    arguments = settings | {"num_inference_steps": steps or settings.get("num_inference_steps") or 28}
    if getattr(pipe.config, "is_distilled", False):
        arguments["guidance_scale"] = 1.0
    if pipe.text_encoder is not None:
        return arguments | {"prompt": prompt}
    config = pipe.transformer.config
    embeds = torch.randn(1, 512, config.joint_attention_dim, generator=torch.Generator().manual_seed(0))
    return arguments | {"prompt_embeds": embeds.to(pipe.transformer.device, pipe.transformer.dtype)}


def _call(
    pipes: Pipes, prepare: Callable, references: list, keep: float, call: dict, peaks: dict | None = None
) -> Times:
    """Time one call, with what the method does before it."""
    device = pipes.plain._execution_device
    start = now(device)
    pipe, given = prepare(pipes, references, keep)
    prepared = now(device) - start
    taken = inspect.signature(type(pipe).__call__).parameters
    arguments = {name: value for name, value in call.items() if name in taken}
    with timed(pipe, peaks) as times:
        pipe(image=given or None, generator=torch.Generator().manual_seed(0), **arguments)
    times.total += prepared
    return times
