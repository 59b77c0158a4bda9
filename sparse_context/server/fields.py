"""What a form or a JSON body says, as plain values: numbers, texts, lists, and mappings of names to them.

Clients flatten lists and mappings into forms in two ways, `keep[]` and `selector[edges]`, or `keep[0]`; and what they
cannot flatten they may write as one JSON text.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from starlette.datastructures import UploadFile

from ..texts import TwiceError, once_each
from .errors import ApiError, short

NAME = re.compile(r"([^\[\]]+)(?:\[([^\[\]]*)\])?")
DEEPEST, LONGEST, LARGEST = 3, 64, 2**31 - 1
"""Of values: lists and mappings within each other, their entries, and whole numbers."""


def nest(items: Iterable[tuple[str, str | UploadFile]]) -> dict[str, Any]:
    """The entries of a form by name: a value, a list of them, or a mapping.

    A name that comes more than once is a list. Raises `ApiError` for names that contradict each other.
    """
    found: dict[str, dict[str | int, Any]] = {}
    kinds: dict[str, str] = {}
    for name, value in items:
        match = NAME.fullmatch(name)
        if match is None:
            raise ApiError(400, f"The field {short(name)} is too deep: send it as one JSON text.", code="unknown_field")
        top, key = match[1], match[2]
        entries = found.setdefault(top, {})
        counted = key is not None and re.fullmatch("[0-9]{1,4}", key) is not None
        kind = "one" if key is None else "list" if key == "" or counted else "mapping"
        place = int(key or 0) if counted else key or len(entries)
        if kinds.setdefault(top, kind) != kind or place in entries:
            raise ApiError(400, f"{short(top)} was sent in two ways: send it once.", param=top)
        entries[place] = value
    return {name: _joined(entries, kinds[name]) for name, entries in found.items()}


def _joined(entries: Mapping[str | int, Any], kind: str) -> Any:
    if kind == "mapping":
        return {name: from_text(value) for name, value in entries.items()}
    if kind == "one" and len(entries) == 1:
        return next(iter(entries.values()))
    return [value for _, value in sorted(entries.items())]


def from_text(value: Any) -> Any:
    """What a text of a form says: a number, true, a list as JSON has them, or else the text itself. Files stay."""
    if isinstance(value, list):
        return [from_text(each) for each in value]
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, parse_constant=_no_number, object_pairs_hook=once_each)
    except TwiceError as error:
        raise ApiError(400, f"{short(value)} {error}") from None
    except (ValueError, RecursionError):
        return value


def _no_number(name: str) -> None:
    raise ValueError(name)


def read_json(body: bytes) -> dict[str, Any]:
    """A JSON object. Raises `ApiError` for anything else."""
    try:
        read = json.loads(body, parse_constant=_no_number, object_pairs_hook=once_each)
    except TwiceError as error:
        raise ApiError(400, f"The body {error}", code="invalid_json") from None
    except (ValueError, RecursionError):
        raise ApiError(400, "The body is not JSON: send an object with a prompt.", code="invalid_json") from None
    if not isinstance(read, dict):
        raise ApiError(400, f"The body is {short(read)}: send an object with a prompt.", code="invalid_json")
    return read


def check(name: str, value: Any, schema: Mapping[str, Any]) -> Any:
    """A value, if it is as its schema says, of which only what is here is known. Raises `ApiError` that says how to
    mend it."""
    kind = schema.get("type")
    if "enum" in schema:
        if value not in schema["enum"] or isinstance(value, bool):
            choices = ", ".join(map(str, schema["enum"]))
            raise _wrong(name, value, f"choose one of {choices}")
    elif kind == "string":
        if not isinstance(value, str) or not re.fullmatch(schema.get("pattern", "(?s).*"), value):
            raise _wrong(name, value, schema["description"] if "pattern" in schema else "pass a text")
        least, most = schema.get("minLength", 0), schema.get("maxLength", math.inf)
        if not least <= len(value) <= most:
            raise ApiError(400, f"{name} has {len(value)} characters: pass {least} to {most} of them.", param=name)
    elif kind == "boolean":
        if not isinstance(value, bool):
            raise _wrong(name, value, "pass true or false")
    elif kind in ("integer", "number"):
        low, high = schema.get("minimum", 0), schema.get("maximum", math.inf)
        types = (int,) if kind == "integer" else (int, float)
        if not isinstance(value, types) or isinstance(value, bool) or not low <= value <= high:
            what = "whole number" if kind == "integer" else "number"
            raise _wrong(name, value, f"pass a {what} from {low} to {high}")
    else:
        _check_plain(name, value)
    return value


def _wrong(name: str, value: Any, advice: str) -> ApiError:
    return ApiError(400, f"{name} is {short(value)}: {advice}.", param=name)


def _check_plain(name: str, value: Any, depth: int = 0) -> None:
    """Raise `ApiError` for what is no plain value, or beyond all measure."""
    if isinstance(value, (list, dict)):
        if depth == DEEPEST or len(value) > LONGEST:
            raise _wrong(name, value, "pass fewer values")
        for each in value.values() if isinstance(value, dict) else value:
            _check_plain(name, each, depth + 1)
    elif isinstance(value, str) and len(value) > 1000:
        raise ApiError(400, f"{name} has {len(value)} characters: pass fewer.", param=name)
    elif isinstance(value, int) and abs(value) > LARGEST:
        raise ApiError(400, f"{name} is beyond all measure: pass a number up to {LARGEST}.", param=name)
    elif not isinstance(value, (str, int, float, bool, type(None))):
        raise ApiError(400, f"{name} is a file: send it as text.", param=name)
