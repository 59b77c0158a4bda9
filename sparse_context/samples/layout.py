"""What every layout is read into, and what its readers have in common."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .names import ILLEGAL
from .sample import ManifestError

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".ppm")
"""Suffixes of pictures, in small letters."""


Row = Mapping[str, object] | list[str]
"""The keys of a manifest, or everything that is wrong with a row."""


class Layout(NamedTuple):
    """Rows as a manifest has them.

    rows: where each is, for messages, and what it holds; paths are absolute. notes:
    what the source says that is not used here, a sentence each.
    """

    rows: Sequence[tuple[str, Row]]
    notes: tuple[str, ...] = ()


def is_image(name: str) -> bool:
    """Whether a file's name is that of a picture."""
    return name.lower().endswith(IMAGES) and not name.rpartition("/")[2].startswith(".")


def by_number(text: str) -> list[Any]:
    """A key that sorts `a10` behind `a9`."""
    return [int(part) if part.isdecimal() else part.casefold() for part in re.split(r"(\d+)", text)]


def unused(keys: Iterable[str], where: str) -> tuple[str, ...]:
    """The sentence that names settings which are not used here; none where there are none."""
    names = sorted(set(keys))
    if not names:
        return ()
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return (f"{where}: {listed} {'is' if len(names) == 1 else 'are'} not used; this run's own settings apply.",)


def folder_of(entry: object, base: Path, where: str) -> Path:
    """The folder that a setting names: relative to `base`, or to where the command runs, as its own trainer has it.

    Raises `ManifestError` for one that is not there.
    """
    if isinstance(entry, str) and entry:
        for folder in (base / entry, Path(entry)):
            if os.path.isdir(folder):  # which, unlike pathlib's, takes names that are too long
                return folder.absolute()
    raise ManifestError(f"{where}: the folder {entry!r} does not exist; correct the path.")


def caption_suffix(entry: object, where: str) -> str:
    """The suffix of captions that a setting names, with its dot. Raises `ManifestError` for one that no file has."""
    suffix = "." + str(entry).lstrip(".")
    if suffix == "." or re.search(ILLEGAL, suffix):
        raise ManifestError(f"{where}: the suffix of captions is {entry!r}: write one such as .txt.")
    return suffix


def read_caption(path: Path) -> str | None:
    """The text beside a picture; None where there is no such file. Raises `ManifestError` for one that is no text."""
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"The caption {path} cannot be read as text ({error}): write it in UTF-8.") from error
