"""What a model wants of a call, and what a call may ask of it."""

import inspect
import math
from collections.abc import Callable, Container, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..config import SparseContextConfig, meaning_of, per_reference
from ..families import FAMILIES, Family, family_of
from ..selectors.registry import SelectorsLike, map_masks
from .embedded import CALL_FILE, WEIGHTS, read_call_settings
from .hub import class_name_of, one_line

MOST_STEPS, MOST_PIXELS = 1000, 16384  # of a call; pixels a side


def check_references(model: str | None, count: int, inpaint: bool) -> None:
    """Refuse what a model's pipeline cannot take, before any weights are read. Raises ValueError.

    count: how many references there are. inpaint: whether there is a mask of what to paint over.
    """
    path = str(WEIGHTS) if model is None else model
    name = class_name_of(path)
    check_images(name, FAMILIES[name], count, inpaint, read_settings(path).get("max_references"))


def check_call(
    prompt: str, seed: int, steps: int | None, height: int | None, width: int | None, guidance_scale: float | None
) -> None:
    """Raise ValueError for what no model takes, of the fields of a `Request`: before one is loaded, if need be."""
    dials = ("steps", steps, MOST_STEPS), ("height", height, MOST_PIXELS), ("width", width, MOST_PIXELS)
    for dial, value, most in dials:
        if value is not None and (not isinstance(value, Integral) or isinstance(value, bool)):
            raise ValueError(f"{dial} is {value!r}: pass a whole number above 0.")
        if value is not None and value < 1:
            raise ValueError(f"{dial} is {value}: pass a number above 0.")
        if value is not None and value > most:
            raise ValueError(f"{dial} is {value}: pass {most} at most.")
    check_text("prompt", prompt)
    if not isinstance(seed, Integral) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}: pass a number from 0 to {2**63 - 1}.")
    is_number = isinstance(guidance_scale, Real) and not isinstance(guidance_scale, bool)
    if guidance_scale is not None and not (is_number and 0 <= guidance_scale < math.inf):
        raise ValueError(f"guidance_scale is {guidance_scale!r}: pass a number of 0 or more.")


def check_text(name: str, text: str) -> None:
    """Raise ValueError for a text with bytes in it that are none."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"The {name} {text!r} contains bytes that are not text: write it in UTF-8.")


def most_references(model: str | None) -> int | None:
    """How many references a model takes at most, by its index and its call settings; None where nothing says so.

    No weights are read. Raises ValueError where the model is not there, or not supported.
    """
    path = str(WEIGHTS) if model is None else model
    limits = FAMILIES[class_name_of(path)].most, read_settings(path).get("max_references")
    return min((limit for limit in limits if limit is not None), default=None)


def check_images(name: str, family: Family, count: int, inpaint: bool, most: int | None) -> None:
    """Raise ValueError for a number of references, or a mask to paint in, that a family does not take.

    name: the pipeline's class. most: the references that the model itself takes, by its call settings.
    """
    if most is not None and count > most:
        raise ValueError(f"There are {count} references, and this model takes at most {most}: pass fewer.")
    if family.most is not None and count > family.most:
        raise ValueError(f"There are {count} references, and {name} takes at most {family.most}: pass fewer.")
    if count < family.fewest:
        raise ValueError(f"There are {count} references, and {name} needs at least {family.fewest}: pass more.")
    if family.paints and not inpaint:
        raise ValueError(f"{name} paints into its first reference: pass inpaint, a mask that is white where to paint.")
    if inpaint and not family.paints:
        painters = ", ".join(painter for painter, known in FAMILIES.items() if known.paints)
        raise ValueError(f"{name} does not paint into an image: leave inpaint out, or use one of {painters}.")


def call_inputs(pipe: Any) -> Container[str]:
    """The names of what a call of this pipeline takes, such as "height"."""
    return pipe.blocks.input_names if family_of(pipe).modular else inspect.signature(type(pipe).__call__).parameters


def call_settings(pipe: Any) -> dict:
    """What this model wants of a call, from the `call.json` beside its weights; else what suits its class.

    Raises ValueError for a file that cannot be read.
    """
    source = getattr(pipe.config, "_name_or_path", None)  # None for a pipeline that was built in code
    if family_of(pipe).modular:
        source = pipe._pretrained_model_name_or_path
    settings = read_settings(source) if source else {}
    if not settings and getattr(pipe.config, "is_distilled", False):
        settings = {"num_inference_steps": 4}
    if family_of(pipe).guidance == "true_cfg_scale":  # which does nothing without a negative prompt
        settings.setdefault("negative_prompt", " ")
    return settings


def read_settings(source: str) -> dict:
    """The `call.json` of a model in this folder; empty where there is none. Raises ValueError where it is broken."""
    try:
        return dict(read_call_settings(Path(source)) or {})
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(f"The {CALL_FILE} of {source} holds no call settings: {one_line(error)}.") from error


def reference_sides(reference_size: Any, config: SparseContextConfig, count: int) -> list[int | None]:
    """The size that each reference is scaled to, where a model says it: one number, or one for each task.

    A global edit is an edit. Raises ValueError for another number of tasks.
    """
    tasks = per_reference("task", config.task, count)
    if not isinstance(reference_size, Mapping):
        return [reference_size] * count
    meanings = [meaning_of(task, count) for task in tasks]
    return [reference_size.get("edit" if meaning == "global" else meaning) for meaning in meanings]


Fit = Callable[[Image.Image], Image.Image]


def fit_masks(selectors: SelectorsLike, fits: Sequence[Fit]) -> SelectorsLike:
    """`selectors` with the user's masks in it scaled and padded as `fits` do with the pictures of each reference."""

    def fit(i: int, mask: np.ndarray) -> np.ndarray:
        # What is beyond the references stays as it is, and is refused where tokens are selected
        return np.asarray(fits[i](Image.fromarray(mask))) if i < len(fits) else mask

    return map_masks(selectors, fit)
