"""Settings as JSON: which model to load, what to keep of references, how to call it. Every face reads and writes them.

    {"model": "black-forest-labs/FLUX.2-klein-4B", "keep": 0.1, "task": "subject", "overview": 4, "steps": 4}

The keys are the fields of `ModelSpec`, of `SparseContextConfig` and of `Request`, less those that hold pictures; so a
field that one of these gets is a key at once. `seed` is that of the image noise. What is left out has its default.
Pictures stay outside: a selector with the user's own masks is written as "mask", which reads the alpha channels. So
do a phrase and a model that a selector holds: a file has them as `phrases` and `text_model`.
"""

import difflib
import json
import types
from collections.abc import Container, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np

from ..config import SparseContextConfig
from ..images import save_text
from ..selectors.masks import Mask
from ..selectors.registry import parts_of
from ..selectors.text import Text
from ..texts import TwiceError, once_each, read_word
from .spec import ModelSpec, Request

MODEL_KEYS = tuple(each.name for each in fields(ModelSpec))
"""Which model is loaded, and how."""

CONFIG_KEYS = tuple(each.name for each in fields(SparseContextConfig) if each.name != "seed")
"""What is kept of references."""

CALL_KEYS = tuple(each.name for each in fields(Request) if each.name not in ("references", "config", "inpaint"))
"""What is asked of the model, and how."""

REQUEST_KEYS = CONFIG_KEYS + CALL_KEYS
"""What may differ from request to request."""

ALL_KEYS = MODEL_KEYS + REQUEST_KEYS


@dataclass(frozen=True)
class Settings:
    """Which model to load, and a request without pictures: `replace(settings.request, references=[...])` is one."""

    spec: ModelSpec = field(default_factory=ModelSpec)
    request: Request = field(default_factory=lambda: Request(""))

    def to_dict(self) -> dict[str, Any]:
        """For JSON: `keep`, and what is no default. Raises ValueError for a selector that is a function."""
        usual = Settings()
        values: dict[str, Any] = {"keep": _plain(self.request.config.keep)}
        for record, default, keys in (
            (self.spec, usual.spec, MODEL_KEYS),
            (self.request.config, usual.request.config, CONFIG_KEYS),
            (self.request, usual.request, CALL_KEYS),
        ):
            for name in keys:
                value = getattr(record, name)
                value = _plain_selector(value) if name == "selector" else _plain(value)
                if value != getattr(default, name):
                    values[name] = value
        return values


def read_settings(path: Path) -> Settings:
    """The settings in a JSON file. Raises ValueError, in one sentence, for a file that holds none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=once_each)
    except TwiceError as error:
        raise ValueError(f"The settings {path}: an object {error}") from error
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise ValueError(f"The settings {path} cannot be read ({reason}): name a JSON file.") from error
    if not isinstance(values, dict):
        raise ValueError(f"The settings {path} hold no JSON object: write them as {{...}}.")
    try:
        return parse_settings(values)
    except ValueError as error:
        raise ValueError(f"The settings {path}: {error}") from error


def write_settings(settings: Settings, path: Path) -> None:
    """Write settings to a JSON file, whole or not at all. Raises ValueError as `Settings.to_dict` and `save_text`."""
    save_text(json.dumps(settings.to_dict(), indent=2, ensure_ascii=False) + "\n", path)


def parse_settings(
    values: Mapping[str, Any], base: Settings | None = None, keys: Container[str] = ALL_KEYS
) -> Settings:
    """`base` (the defaults without one) with these values from JSON in it.

    keys: those that may be there, such as `REQUEST_KEYS` for what comes from elsewhere and loads no model. Raises
    ValueError, in one sentence, for another key and for a value that its field does not take.
    """
    base = base or Settings()
    for name, value in values.items():
        if name not in keys:
            near = difflib.get_close_matches(str(name).lower(), [key for key in ALL_KEYS if key in keys], n=1)
            near = ["phrases"] if name == "text" and "phrases" in keys else near  # as the command calls it
            hint = f"Did you mean {near[0]!r}?" if near else "Leave it out."
            raise ValueError(f"{name!r} is no setting here. {hint}")
        if name in _HINTS:
            _check_type(name, value)

    def chosen(of: Container[str]) -> dict[str, Any]:
        return {name: read_word(name, value) for name, value in values.items() if name in of}

    config = replace(base.request.config, **chosen(CONFIG_KEYS))
    return Settings(replace(base.spec, **chosen(MODEL_KEYS)), replace(base.request, config=config, **chosen(CALL_KEYS)))


_HINTS = {k: v for record in (ModelSpec, Request) for k, v in get_type_hints(record).items() if k not in CONFIG_KEYS}
"""Of fields whose records do not look at the types of their values themselves, as `SparseContextConfig` does."""


def _check_type(name: str, value: object) -> None:
    hint = _HINTS[name]
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if float in kinds:
        kinds = (*kinds, int)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        said = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
        wanted = " or ".join(said[kind] for kind in kinds if not (kind is int and float in kinds))
        raise ValueError(f"{name} is {value!r}: pass {wanted}.")


def _plain(value: Any) -> Any:
    """A value of a field as JSON has it."""
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value.item() if isinstance(value, np.generic) else value


def _plain_selector(selector: Any) -> Any:
    if isinstance(selector, (list, tuple)):
        return [_plain_selector(each) for each in selector]
    if selector is None or isinstance(selector, str):
        return selector
    if isinstance(selector, Mask):
        return "mask"
    if isinstance(selector, Text):
        if selector != Text():
            raise ValueError(
                f"The selector {selector.label!r} holds a phrase or a model of its own, which no file can hold: name "
                "it 'text', and pass phrases and text_model beside it."
            )
        return "text"
    blended = {_plain_selector(part): float(weight) for part, weight in parts_of(selector) if not parts_of(part)}
    if not blended or len(blended) < len(parts_of(selector)):
        label = getattr(selector, "label", None) or getattr(selector, "__name__", None) or type(selector).__name__
        raise ValueError(f"The selector {label!r} is a function, which no file can hold: name one of the package's.")
    return blended
