"""Data sets of musubi-tuner, by their .toml: folders of images, captions and controls, or JSONL files of paths.

[[datasets]]
image_directory = "images"          # cat.png, cat.txt
control_directory = "controls"      # cat.png, or cat_0.png, cat_1.png: the references

[[datasets]]
image_jsonl_file = "rows.jsonl"     # {"image_path": ..., "control_path_0": ..., "caption": ...}
"""

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .layout import Layout, Row, by_number, folder_of, is_image, read_caption, unused
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
    return path.suffix.lower() == ".toml" and path.is_file()


def read(source: str, columns: Mapping[str, str]) -> Layout:
    """The rows of all data sets of a file. Raises `ManifestError`."""
    path = Path(source)
    try:
        record = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
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
    caption = str(settings.get("caption_extension") or ".txt")
    images = {path.stem: path for path in _pictures(folder)}
    found: dict[str, list[tuple[int, Path]]] = {stem: [] for stem in images}
    for path in _pictures(controls):
        stem, _, number = path.stem.rpartition("_")
        if path.stem in found:  # also where that ends in a number, as the image's name then does too
            found[path.stem].append((-1, path))
        elif stem in found and number.isdecimal():
            found[stem].append((int(number), path))
    rows: list[tuple[str, Row]] = []
    for stem, path in images.items():
        text = read_caption(path.with_suffix(caption))
        label = f"{folder.name}/{path.name}"
        if not found[stem]:
            rows.append((label, [f"{label} has no control image: put {stem}.png into {controls.name}."]))
        elif text is None:
            rows.append((label, [f"{label} has no caption: write it into {stem}{caption}."]))
        else:
            references = [str(each) for _, each in sorted(found[stem])]
            rows.append((label, {"references": references, "image": str(path), "prompt": text}))
    return rows


def _pictures(folder: Path) -> list[Path]:
    found = [path for path in folder.iterdir() if path.is_file() and is_image(path.name)]
    return sorted(found, key=lambda path: by_number(path.name))


def _read_lines(entry: object, base: Path, where: str) -> list[tuple[str, Row]]:
    """The rows of a JSONL file with musubi-tuner's own keys; paths are relative to it, or to where the command runs."""
    files = [base / str(entry), Path(str(entry))]
    path = next((each for each in files if each.is_file()), None)
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
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return [f"{label} is no JSON ({error})."]
    if not isinstance(row, dict):
        return [f"{label} is no JSON object: write one as {{...}}."]
    if "image_path_0" in row:
        return [f"{label} has several images to be made, which is not supported: write one as image_path."]
    controls = {int(key[13:] or 0): row[key] for key in row if re.fullmatch(r"control_path(_\d+)?", key)}
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
    return str((inside if inside.exists() or not Path(entry).exists() else Path(entry)).absolute())
