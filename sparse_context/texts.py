"""Settings as people write them: the texts of options, of fields on a page, and of JSON files."""

from typing import Any

WORDS = {"selector": "auto", "overview": "none"}
"""By the name of a setting, what people write for None."""


class TwiceError(ValueError):
    """A key comes twice in a JSON object."""


def once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, for `object_pairs_hook`. Python's own reader takes the last value of a key that comes twice,
    without a word. Raises `TwiceError`."""
    entries: dict[str, Any] = {}
    for key, value in pairs:
        if key in entries:
            raise TwiceError(f"has {key[:80]!r} twice: write it once.")
        entries[key] = value
    return entries


def read_word(name: str, value: Any) -> Any:
    """A setting as JSON has it, or one for each reference: None for the word that says so."""
    if isinstance(value, list):
        return [read_word(name, each) for each in value]
    return None if name in WORDS and value == WORDS[name] else value


def read_keep(text: str) -> float | int | str:
    """A ratio, a count or "auto". Raises ValueError for other texts."""
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    if text == "auto":
        return text
    raise ValueError(f"keep is {text!r}: pass a ratio such as 0.2, a count such as 400, or auto.")


def read_overview(text: str) -> int | str | None:
    """A factor, "auto", "trained", or None for "none". Raises ValueError for other texts."""
    if text in ("auto", "trained", "none"):
        return None if text == "none" else text
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"overview is {text!r}: pass a factor such as 4, auto, trained or none.") from None


def read_selector(text: str) -> Any:
    """A selector by its name or as a blend; None for "auto". Raises ValueError for a blend that is none."""
    if text == "auto":
        return None
    if "=" not in text:
        return text
    from .selectors.registry import read_weights

    return read_weights("selector", text, "saliency=0.7,edges=0.3")
