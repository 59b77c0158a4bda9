"""WebDataset: .tar files with the files of each sample behind each other, under one name up to its first dot.

    000123.image.jpg  000123.reference0.png  000123.reference1.png  000123.prompt.txt  000123.json

What stands between name and suffix is a field: `image`, `mask`, `prompt`, `reference0` and so on with their
`reference_mask0`. Without it the suffix is: `000123.txt` has the field `txt`, so `columns` may say that this is the
prompt. The keys of a .json are fields too, as a manifest has them.

A source is a folder of .tar files, or a path or URL of some: `shards/{000..099}.tar`.
"""

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..images import PictureError
from .archives import Member, is_remote, members
from .layout import Layout, Row, by_number
from .progress import progress
from .sample import ManifestError

_BRACES = re.compile(r"\{([^{}]*)\}")


def fits(source: str) -> bool:
    """Whether a source is one of .tar files."""
    path = Path(source)
    if path.is_dir():
        return any(path.glob("*.tar"))
    return source.lower().endswith(".tar") and (is_remote(source) or path.is_file() or bool(_BRACES.search(source)))


def read(source: str, columns: Mapping[str, str]) -> Layout:
    """The samples of all shards, in their order: their texts are read, and of pictures the names.

    Every shard is read through once, so one at a URL is fetched. Shows a progress bar. Raises `ManifestError`.
    """
    archives = _archives(source)
    rows: list[tuple[str, Row]] = []
    fields = {columns.get(field, field): field for field in ("image", "mask", "prompt", "references")}
    for i in progress(len(archives), "shards", "shard"):
        try:
            inside = members(archives[i])
            for key, group in itertools.groupby(inside, lambda member: _split(member.name)[0]):
                where = f"{archives[i]}/{key}"
                rows.append((where, _row(list(group), fields, where)))
        except PictureError as error:
            raise ManifestError(f"{error}.") from error
    return Layout(rows)


def _archives(source: str) -> list[str]:
    path = Path(source)
    if path.is_dir():
        return [str(each.absolute()) for each in sorted(path.glob("*.tar"), key=lambda each: by_number(each.name))]
    return [name if is_remote(name) else str(Path(name).absolute()) for name in expand(source)]


def expand(pattern: str) -> Iterator[str]:
    """The names that a pattern stands for: `{000..002}` counts, and `{a,b}` lists."""
    found = _BRACES.search(pattern)
    if found is None:
        yield pattern
        return
    first, dots, last = found[1].partition("..")
    if dots and first.isdecimal() and last.isdecimal():
        options = [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
    else:
        options = found[1].split(",")
    for option in options:
        yield from expand(pattern[: found.start()] + option + pattern[found.end() :])


def _split(name: str) -> tuple[str, str]:
    """The name of a sample, with its folder, and what comes behind the first dot."""
    folder, slash, file = name.rpartition("/")
    key, _, rest = file.partition(".")
    return folder + slash + key, rest


def _row(group: list[Member], fields: Mapping[str, str], where: str) -> Row:
    row: dict[str, object] = {}
    numbered: dict[str, dict[int, str]] = {"references": {}, "reference_masks": {}}
    for member in group:
        field, _, suffix = _split(member.name)[1].rpartition(".")
        field = field or suffix
        number = re.fullmatch(r"(reference|reference_mask)(\d+)", field)
        if number:
            numbered[f"{number[1]}s"][int(number[2])] = str(member)
        elif fields.get(field) == "references":
            numbered["references"][0] = str(member)
        elif fields.get(field) in ("image", "mask"):
            row[fields[field]] = str(member)
        elif fields.get(field) == "prompt":
            row["prompt"] = _text(member, where)
        elif suffix == "json":
            row |= _object(member, where)
    references, masks = numbered["references"], numbered["reference_masks"]
    if references:
        row["references"] = [references[number] for number in sorted(references)]
    if masks:
        row["reference_masks"] = [masks.get(number) for number in sorted(references)]
    return row


def _text(member: Member, where: str) -> str:
    try:
        return member.read().decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ManifestError(f"{where} has a text that is none ({error}): write it in UTF-8.") from error


def _object(member: Member, where: str) -> dict[str, object]:
    try:
        record = json.loads(member.read())
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{where}.json is no JSON ({error}).") from error
    if not isinstance(record, dict):
        raise ManifestError(f"{where}.json is no JSON object: write one as {{...}}.")
    return record
