"""Samples of any source, written down as a manifest."""

import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from ..images import save_bytes, save_text
from .archives import Member
from .names import file_key
from .progress import progress
from .sample import ManifestError, Picture, Sample


def write_manifest(samples: Sequence[Sample], path: Path) -> None:
    """Write samples as a JSONL manifest. Paths are relative to it, where they are on the same drive.

    Pictures that are in no file, as those of a data set, are written into a folder beside it, which goes by its name.
    Shows a progress bar. Raises `ManifestError` and OSError; then there is no manifest.
    """
    folder = path.with_suffix("")
    lines = []
    names: dict[str, int] = {}  # a picture that is written goes by its sample's name
    for i in progress(len(samples), "manifest", "row"):
        sample = samples[i]
        if names.setdefault(file_key(sample.name), i) != i:
            first = samples[names[file_key(sample.name)]].name
            raise ManifestError(
                f"The samples {names[file_key(sample.name)] + 1} and {i + 1} are named {first!r} and "
                f"{sample.name!r}, which is one file on some systems: give each its own name."
            )
        row: dict[str, object] = {
            "name": sample.name,
            "references": [
                name_picture(each, path, folder / f"{sample.name}-{n}")
                for n, each in enumerate(sample.references, start=1)
            ],
            "prompt": sample.prompt,
        }
        for field, picture in (("image", sample.image), ("mask", sample.mask)):
            if picture is not None:
                row[field] = name_picture(picture, path, folder / f"{sample.name}-{field}")
        if sample.reference_masks:
            row["reference_masks"] = [
                None if each is None else name_picture(each, path, folder / f"{sample.name}-mask-{n}")
                for n, each in enumerate(sample.reference_masks, start=1)
            ]
        row |= dict(_others(sample))
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    save_text("".join(lines), path)


def _others(sample: Sample) -> Iterator[tuple[str, object]]:
    if sample.task is not None:
        yield "task", sample.task
    if any(sample.phrases):
        yield "phrases", list(sample.phrases)
    if sample.aligned:
        yield "aligned", True


def name_picture(picture: Picture, manifest: Path, stem: Path) -> str:
    """A picture as `manifest`, or another file, names it: relative to that. stem: of the file, without its suffix, that
    is written for a picture in none. Raises `ManifestError` and OSError."""
    if isinstance(picture, Member) and picture.remote:
        return str(picture)
    if isinstance(picture, Member):
        return f"{_relative(Path(picture.archive), manifest)}/{picture.name}"
    if isinstance(picture, bytes):
        picture = _write(picture, stem)
    return _relative(picture, manifest)


def _relative(path: Path, manifest: Path) -> str:
    place = os.path.join(os.path.realpath(path.parent), path.name)  # a link on the way would lead `..` elsewhere
    try:
        return Path(os.path.relpath(place, os.path.realpath(manifest.parent))).as_posix()
    except ValueError:  # another drive
        return path.absolute().as_posix()


def _write(content: bytes, stem: Path) -> Path:
    """The bytes of a picture in a file, as they are."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            suffix = {"JPEG": ".jpg"}.get(image.format or "", f".{(image.format or 'png').lower()}")
    except (OSError, SyntaxError, ValueError) as error:
        raise ManifestError(f"The sample {stem.name} has a picture that cannot be read ({error}).") from error
    except Image.DecompressionBombError as error:
        raise ManifestError(f"The sample {stem.name} has a picture that is too large ({error}).") from error
    path = stem.with_name(stem.name + suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        save_bytes(content, path)
    elif path.read_bytes() != content:
        raise ManifestError(f"{path} is there already and would be overwritten: name another manifest, or move it.")
    return path
