"""Settings as people write them: the texts of options and of fields on a page."""

from typing import Any


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
