"""Data sets of musubi-tuner, by their .toml: folders of images, captions and controls, or JSONL files of paths.

[[datasets]]
image_directory = "images"          # cat.png, cat.txt
control_directory = "controls"      # cat.png, or cat_0.png, cat_1.png: the references

[[datasets]]
image_jsonl_file = "rows.jsonl"     # {"image_path": ..., "control_path_0": ..., "caption": ...}
"""

import json
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..texts import TwiceError, once_each
from .layout import Layout, Row, by_number, caption_suffix, folder_of, is_image, read_caption, unused
from .sample import ManifestError

USED = {"image_directory", "image_jsonl_file", "control_directory", "caption_extension"}
REFUSED = {
    "video_directory": "is of videos",
    "video_jsonl_file": "is of videos",
    "multiple_target": "has several images to be made of each row",
}


def fits(source: str) -> bool:
    """Whether a source is a .toml file."""
    path = Path(source)
    return path.suffix.lower() == ".toml" and os.path.isfile(source)


def read(source: str, columns: Mapping[str, str]) -> Layout:
    """The rows of all data sets of a file. Raises `ManifestError`."""
    path = Path(source)
    try:
        record = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ManifestError(f"{source} cannot be read ({error}): pass the .toml of musubi-tuner data sets.") from error
    parts, general = record.get("datasets"), record.get("general", {})
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in [general, *parts]) or not parts:
        raise ManifestError(f"{source} has no [[datasets]]: pass the .toml of musubi-tuner data sets.")
    rows: list[tuple[str, Row]] = []
    keys: set[str] = set()
    for i, part in enumerate(parts, start=1):
        settings = general | part
        where = f"{source}, data set {i}"
        for key, what in REFUSED.items():
            if settings.get(key):
                raise ManifestError(f"{where} has {key}, so it {what}, which is not supported: leave it out.")
        if settings.get("image_jsonl_file"):
            rows += _read_lines(settings["image_jsonl_file"], path.parent, where)
        else:
            rows += _read_folder(settings, path.parent, where)
        keys |= {key for key, value in settings.items() if value not in (False, [])}
    return Layout(rows, unused(keys - USED, source))


def _read_folder(settings: Mapping[str, Any], base: Path, where: str) -> list[tuple[str, Row]]:
    folder = folder_of(settings.get("image_directory"), base, where)
    controls = folder_of(settings.get("control_directory"), base, where)
    caption = caption_suffix(settings.get("caption_extension") or ".txt", where)
    rows: list[tuple[str, Row]] = []
    images: dict[str, Path] = {}
    for path in _pictures(folder):
        if images.setdefault(path.stem, path) != path:
            rows.append(_both(folder, images[path.stem], path))
    found: dict[str, dict[int, Path]] = {stem: {} for stem in images}
    for path in _pictures(controls):
        stem, _, number = path.stem.rpartition("_")
        if path.stem in found:  # also where that ends in a number, as the image's name then does too
            stem, number = path.stem, "-1"
        elif stem not in found or not number.isdecimal():
            continue
        other = found[stem].setdefault(int(number), path)
        if other != path:
            rows.append(_both(controls, other, path))
    for stem, path in images.items():
        text = read_caption(path.with_suffix(caption))
        label = f"{folder.name}/{path.name}"
        if not found[stem]:
            rows.append((label, [f"{label} has no control image: put {stem}.png into {controls.name}."]))
        elif text is None:
            rows.append((label, [f"{label} has no caption: write it into {stem}{caption}."]))
        else:
            references = [str(found[stem][number]) for number in sorted(found[stem])]
            rows.append((label, {"references": references, "image": str(path), "prompt": text}))
    return rows


def _both(folder: Path, first: Path, second: Path) -> tuple[str, Row]:
    where = f"{folder.name}/{second.name}"
    return where, [f"{where} has the place of {first.name} too: leave one of them out."]


def _pictures(folder: Path) -> list[Path]:
    found = [path for path in folder.iterdir() if path.is_file() and is_image(path.name)]
    return sorted(found, key=lambda path: by_number(path.name))


def _read_lines(entry: object, base: Path, where: str) -> list[tuple[str, Row]]:
    """The rows of a JSONL file with musubi-tuner's own keys; paths are relative to it, or to where the command runs."""
    files = [base / str(entry), Path(str(entry))]
    path = next((each for each in files if os.path.isfile(each)), None)
    if path is None:
        raise ManifestError(f"{where}: the file {entry!r} does not exist; correct the path.")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"{path} cannot be read as text ({error}): write it in UTF-8.") from error
    numbered = [(f"{path.name}, line {number}", line) for number, line in enumerate(lines, start=1) if line.strip()]
    return [(label, _row(line, label, path.parent)) for label, line in numbered]


def _row(line: str, label: str, folder: Path) -> Row:
    try:
        row = json.loads(line, object_pairs_hook=once_each)
    except TwiceError as error:
        return [f"{label} {error}"]
    except (ValueError, RecursionError) as error:
        return [f"{label} is no JSON ({error})."]
    if not isinstance(row, dict):
        return [f"{label} is no JSON object: write one as {{...}}."]
    if "image_path_0" in row:
        return [f"{label} has several images to be made, which is not supported: write one as image_path."]
    controls = {int(key[13:] or 0): row[key] for key in row if re.fullmatch(r"control_path(_\d{1,9})?", key)}
    if "control_path" in row and "control_path_0" in row:
        return [f"{label} has both control_path and control_path_0, which are one: leave one of them out."]
    return {
        "references": [_path(controls[number], folder) for number in sorted(controls)],
        "image": _path(row.get("image_path"), folder),
        "prompt": row.get("caption"),
    }


def _path(entry: object, folder: Path) -> object:
    """A path as a manifest has it."""
    if not isinstance(entry, str):
        return entry
    inside = folder / entry
    return str((inside if os.path.exists(inside) or not os.path.exists(entry) else Path(entry)).absolute())
