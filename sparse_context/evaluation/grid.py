"""The settings that an evaluation compares: each a cell."""

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import product
from typing import Any

import numpy as np

from ..budget import check_budget
from ..config import TASKS, SparseContextConfig
from ..pipelines.engine import Engine, Generation
from ..pipelines.settings import call_inputs, call_settings
from ..pipelines.spec import Request
from ..preview import MAX_AREA
from ..samples import Sample
from ..selectors.masks import Mask
from ..selectors.registry import name_of, parts_of
from .benchmark import BenchmarkSample

DENSE = "dense"
"""The name of the setting that keeps all tokens. Every evaluation has it."""


Maker = Callable[[Sample, SparseContextConfig, int], Generation]
"""(sample, config, seed) -> what a model makes of it: how any pipeline is evaluated."""


@dataclass(frozen=True)
class Cell:
    """One setting of the grid.

    config: what is kept. limit: of how many samples, from the first; None for all. make: how its samples are made;
    None: as `evaluate` is told. about: what else its figures depend on, such as a name for `make`, which resuming
    cannot compare; it goes before the `about` of `evaluate`.
    """

    config: SparseContextConfig
    limit: int | None = None
    make: Maker | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The setting, for JSON, by which a run that goes on knows it. A function of the user's goes by its label."""
        values = {each.name: getattr(self.config, each.name) for each in fields(self.config) if each.name != "seed"}
        return {**values, "selector": _identity(self.config.selector), "limit": self.limit, **self.about}


def _label(selector: Any) -> str:
    """A short name of a selector."""
    if selector is None:
        return "auto"
    if isinstance(selector, Mapping):
        return ",".join(f"{name}={weight:g}" for name, weight in selector.items())
    return selector if isinstance(selector, str) else getattr(selector, "__name__", type(selector).__name__)


def _identity(selector: Any) -> str:
    """What tells a selector apart from others of its label: its phrase, its file, its masks."""
    if isinstance(selector, (list, tuple)):
        return "; ".join(map(_identity, selector))
    if isinstance(selector, Mask) and selector.masks:
        digest = hashlib.sha256()
        for mask in selector.masks:
            digest.update(repr(None if mask is None else np.asarray(mask).shape).encode())
            digest.update(b"" if mask is None else np.ascontiguousarray(mask).tobytes())
        return f"mask {digest.hexdigest()[:16]}"
    if parts := parts_of(selector):
        return ",".join(f"{_identity(part)}={weight:g}" for part, weight in parts)
    return _label(selector) if selector is None or isinstance(selector, str) else name_of(selector) or _label(selector)


def grid(
    keeps: Sequence[float | int | str],
    selectors: Sequence[Any] = (None,),
    *,
    tasks: Sequence[str] = ("auto",),
    coverages: Sequence[float | None] = (None,),
    merges: Sequence[float] = (0.0,),
    overviews: Sequence[int | str | None] = ("trained",),
    limits: Mapping[float | int | str, int] | None = None,
    **settings: Any,
) -> dict[str, Cell]:
    """A cell for every keep, selector, task, coverage, merge and overview, by name.

    All tokens are one cell, `DENSE`, the first.

    limits: how many samples at one keep. settings: other fields of `SparseContextConfig`, such as share.
    Raises ValueError for a value out of range, and for two settings of one name (two functions may have the same).
    """
    limits = limits or {}
    everything = next((keep for keep in keeps if _keeps_all(keep)), 1.0)
    cells = {DENSE: Cell(SparseContextConfig(keep=1.0), limits.get(everything))}
    sparse = [keep for keep in keeps if not _keeps_all(keep)]
    ways = product(selectors, tasks, coverages, merges, overviews, sparse)
    for selector, task, coverage, merge, overview, keep in ways:
        config = SparseContextConfig(
            keep=keep, selector=selector, task=task, coverage=coverage, merge=merge, overview=overview, **settings
        )
        parts = [_label(config.selector), keep]
        parts += [] if task == "auto" else [task]
        parts += [] if coverage is None else [f"coverage={coverage:g}"]
        parts += [f"merge={merge:g}"] if merge else []
        parts += [] if overview == "trained" else [f"overview={overview}".lower()]
        name, cell = re.sub(r"[^\w.,=+-]+", "_", "-".join(map(str, parts))), Cell(config, limits.get(keep))
        if cells.setdefault(name, cell) != cell:
            raise ValueError(
                f"Two settings are named {name!r}: give each function a name of its own, or each setting a run."
            )
    return cells


def _keeps_all(keep: Any) -> bool:
    check_budget(keep)
    return not isinstance(keep, str) and keep == 1


def maker(
    pipe: Any,
    *,
    steps: int | None = None,
    guidance_scale: float | None = None,
    task_of: Callable[[Sample], str | Sequence[str]] | None = None,
) -> Maker:
    """How an `Engine` answers a sample with `pipe`.

    The output has the size that the model's own call settings name, else that of the sample's benchmark, else that of
    its `image`, both in whole tokens and at most a megapixel, else what the pipeline takes from the references.
    (LongCat always does the latter.)

    Where a setting's task is "auto", the sample's own is used: `task_of(sample)`, one for all references or one for
    each; by default `sample.task`, if that is a name of `TASKS`. A selector that was named is taken at its word then
    too: the task adds no coverage to it, unless it is "text", which stands for the task's own rule.
    """
    engine = Engine(pipe=pipe)
    fixed = "height" in call_settings(pipe) or "height" not in call_inputs(pipe)

    def make(sample: Sample, config: SparseContextConfig, seed: int) -> Generation:
        height = width = None
        size = None if fixed else _size(sample)
        if size is not None:
            token = 2 * pipe.vae_scale_factor
            scale = min(1.0, math.sqrt(MAX_AREA / (size[0] * size[1])))
            width, height = (max(token, int(side * scale) // token * token) for side in size)
        task = task_of(sample) if task_of is not None else sample.task if sample.task in TASKS else "auto"
        if config.task == "auto" and task != "auto":
            plain = config.selector not in (None, "text") and config.coverage is None
            config = replace(config, task=task, coverage=0.0 if plain else config.coverage)
        request = Request(
            sample.prompt,
            sample.open_references(),
            config,
            seed=seed,
            steps=steps,
            height=height,
            width=width,
            guidance_scale=guidance_scale,
        )
        return engine(request)

    return make


def _size(sample: Sample) -> tuple[int, int] | None:
    """Width and height of the picture to be made, where the sample says it."""
    if isinstance(sample, BenchmarkSample) and sample.size is not None:
        return sample.size
    truth = sample.open_image()
    return None if truth is None else truth.size
