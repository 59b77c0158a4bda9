"""Pairs by their names, as hosted trainers take them: in a folder, or in a .zip, with or without a folder in that.

    cat_start.png  cat_start2.png  cat_end.png  cat.txt

The first are the references in order, `_end` is the image to be made, and the text is the prompt.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from ..images import PictureError
from .archives import TEXT_BYTES, Member, members
from .layout import Layout, Row, is_image, read_caption
from .sample import ManifestError

_PART = re.compile(r"(?P<root>.+)_(?P<kind>start(?P<number>\d{0,9})|end)\.[^./]+", re.DOTALL)
END = -1  # in the place of a number; _start0 may be one


def fits(source: str) -> bool:
    """Whether a source is a .zip, or a folder with a picture that is called `..._end`."""
    path = Path(source)
    if os.path.isfile(source):
        return path.suffix.lower() == ".zip"
    return os.path.isdir(source) and any(is_image(file.name) for file in path.glob("*_end.*"))


def read(source: str, columns: Mapping[str, str]) -> Layout:
    """The pairs of a folder or a .zip, in the order of their names. Raises `ManifestError`."""
    files = _files(Path(source))
    found: dict[str, dict[int, str]] = {}
    for name in files:
        part = _PART.fullmatch(name)
        if part and is_image(name):
            number = END if part["kind"] == "end" else int(part["number"] or 1)
            other = found.setdefault(part["root"], {}).setdefault(number, name)
            if other != name:
                raise ManifestError(f"{source} has both {other} and {name}: leave one of them out.")
    if not found:
        raise ManifestError(f"{source} holds no pictures that are named as cat_start.png and cat_end.png: rename them.")
    pictures = {name for parts in found.values() for name in parts.values()}
    others = [name for name in files if is_image(name) and name not in pictures]
    rows = [(root, _row(root, parts, files)) for root, parts in sorted(found.items())]
    note = f"{source}: {len(others)} other pictures, such as {others[0]}, are not used." if others else ""
    return Layout(rows, (note,) if note else ())


def _files(path: Path) -> dict[str, Path | Member]:
    """The files of a source by their names, with slashes."""
    if path.is_dir():
        return {file.name: file.absolute() for file in sorted(path.iterdir()) if file.is_file()}
    try:
        inside = members(str(path.absolute()))
    except PictureError as error:
        raise ManifestError(f"{error}.") from error
    return {member.name: member for member in inside if not member.name.startswith("__MACOSX/")}


def _row(root: str, parts: Mapping[int, str], files: Mapping[str, Path | Member]) -> Row:
    references = [str(files[name]) for number, name in sorted(parts.items()) if number != END]
    if END not in parts or not references:
        lacks = "_start" if END in parts else "_end"
        return [f"{root} has no {root}{lacks} image: add it, or leave the others out."]
    text = files.get(f"{root}.txt")
    if text is None:
        return [f"{root} has no prompt: write it into {root}.txt."]
    return {"references": references, "image": str(files[parts[END]]), "prompt": _text(text)}


def _text(file: Path | Member) -> str | None:
    if isinstance(file, Path):
        return read_caption(file)
    try:
        return file.read(TEXT_BYTES).decode("utf-8-sig").strip()
    except PictureError as error:
        raise ManifestError(f"{error}.") from error
    except UnicodeDecodeError as error:
        raise ManifestError(f"The prompt {file} cannot be read as text ({error}): write it in UTF-8.") from error
