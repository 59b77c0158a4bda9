"""Whole calls, timed turn by turn."""

import inspect
from collections.abc import Callable, Sequence
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
from .figures import Figures, Measurement, Setting
from .methods import METHODS, Pipes, make_pipes
from .report import compare
from .turns import take_turns, watch_tokens

TIMED = ("Flux2KleinPipeline", "Flux2Pipeline")


REPORTED = ("text", "encode", "selection", "denoise", "decode", "total")


def bench(pipe: Any, pictures: Sequence[Image.Image], prompt: str, config: BenchConfig) -> Figures:
    """Time whole calls of `pipe`, a FLUX.2 klein or dev of any size.

    `pictures` are the references, used again from the first where there are too few. Where `pipe` has no text encoder,
    the prompt's embeddings are drawn, and encoding the text takes no time. Raises ValueError for what the model does
    not take.
    """
    settings, sizes = _check(pipe, config)
    pipes = make_pipes(pipe)
    if pipes.kv is None and any(METHODS[method].kv for method in config.methods or ()):
        raise ValueError(f"{type(pipe).__name__} has no pipeline that reuses keys and values: leave out kv, sparse_kv.")
    methods = config.methods or [m for m in METHODS if pipes.kv is not None or not METHODS[m].kv]
    call = _arguments(pipe, settings, prompt, config.steps)
    jobs = []
    for size in sizes:
        for count in config.references:
            references = _references(pictures, count, size, settings.get("reference_size"))
            for method, keep in config.cells(methods):
                jobs.append(_Job(pipes, Setting(size, count, method, keep), references, call))
    turns = take_turns(jobs, config)
    measurements = [
        Measurement(
            job.setting, job.tokens[0], {name: [getattr(each, name) for each in times] for name in REPORTED}, job.memory
        )
        for job, times in zip(jobs, turns, strict=True)
    ]
    token, steps = 2 * pipe.vae_scale_factor, call["num_inference_steps"]
    shape = shape_of(pipe.transformer, token, measurements[0].tokens.text, steps)
    return Figures(turns=len(turns[0]), steps=steps, rows=compare(measurements, shape))


def _check(pipe: Any, config: BenchConfig) -> tuple[dict[str, Any], Sequence[int]]:
    """What the model wants of a call, and the sizes of the output. Raises ValueError for what it does not take."""
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
    return settings, sizes


def _references(pictures: Sequence[Image.Image], count: int, size: int, reference_size: Any) -> list[Image.Image]:
    """So many references, in the size of the output or in that which the model names."""
    chosen = [pictures[i % len(pictures)].convert("RGB") for i in range(count)]
    if reference_size is None:
        return [picture.resize((size, size), Image.Resampling.LANCZOS) for picture in chosen]
    sides = reference_sides(reference_size, SparseContextConfig(), count)
    return [fit_reference(*pair) for pair in zip(chosen, sides, strict=True)]


class _Job:
    """The calls of one setting. The warm-up also watches memory and counts tokens."""

    def __init__(self, pipes: Pipes, setting: Setting, references: list[Image.Image], call: dict[str, Any]) -> None:
        self.setting, self.tokens = setting, list[Tokens]()
        self.memory: dict[str, int] = {}
        self._pipes, self._references = pipes, references
        self._call = call | {"height": setting.size, "width": setting.size}

    def __call__(self, warm_up: bool) -> Times:
        keep = 0.0 if self.setting.keep is None else self.setting.keep
        arguments = self._pipes, METHODS[self.setting.method].prepare, self._references, keep, self._call
        if not warm_up:
            return _call(*arguments)
        side = self.setting.size // (2 * self._pipes.plain.vae_scale_factor)
        hooks = [watch_tokens(pipe.transformer, self.tokens, side) for pipe in self._pipes.all()]
        try:
            return _call(*arguments, self.memory)
        finally:
            for hook in hooks:
                hook.remove()


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
    pipe, pictures = prepare(pipes, references, keep)
    prepared = now(device) - start
    parameters = inspect.signature(type(pipe).__call__).parameters
    arguments = {name: value for name, value in call.items() if name in parameters}
    with timed(pipe, peaks) as times:
        pipe(image=pictures or None, generator=torch.Generator().manual_seed(0), **arguments)
    times.total += prepared
    return times
