"""WebDataset: .tar files with the files of each sample behind each other, under one name up to its first dot.

    000123.image.jpg  000123.reference0.png  000123.reference1.png  000123.prompt.txt  000123.json

What stands between name and suffix is a field: `image`, `mask`, `prompt`, `reference0` and so on with their
`reference_mask0`. Without it the suffix is: `000123.txt` has the field `txt`, so `columns` may say that this is the
prompt. The keys of a .json are fields too, by the same names; where a file holds the field, the file counts. Hidden
files and files without a suffix belong to no sample.

A source is a folder of .tar files, or a path or URL of some: `shards/{000..099}.tar`.
"""

import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from ..images import PictureError
from ..texts import TwiceError, once_each
from .archives import TEXT_BYTES, Member, is_remote, members
from .layout import Layout, Row, by_number
from .progress import progress
from .sample import ManifestError

MOST = 100_000
"""Shards of a source, so that a slip in its numbers ends at once."""

_BRACES = re.compile(r"\{([^{}]*)\}")
_COUNT = re.compile(r"(\d{1,18})\.\.(\d{1,18})")
_NUMBERED = re.compile(r"(reference|reference_mask)(\d{1,9})")


def fits(source: str) -> bool:
    """Whether a source is one of .tar files."""
    if os.path.isdir(source):
        return bool(_inside(Path(source)))
    named = source.lower().endswith((".tar", ".tar.gz", ".tgz"))  # of which the last two are refused with a reason
    return named and (is_remote(source) or os.path.isfile(source) or bool(_BRACES.search(source)))


def read(source: str, columns: Mapping[str, str]) -> Layout:
    """The samples of all shards, in their order: their texts are read, and of pictures the names.

    Every shard is read through once, so one at a URL is fetched. Shows a progress bar. Raises `ManifestError`.
    """
    archives = _archives(source)
    rows: list[tuple[str, Row]] = []
    fields = {columns.get(field, field).lower(): field for field in ("image", "mask", "prompt", "references")}
    names = {column: field for field, column in columns.items()}
    for i in progress(len(archives), "shards", "shard"):
        try:
            inside = [member for member in members(archives[i]) if _is_part(member.name)]
            for key, group in itertools.groupby(inside, lambda member: _split(member.name)[0]):
                where = f"{archives[i]}/{key}"
                rows.append((where, _row(list(group), fields, names, where)))
        except PictureError as error:
            raise ManifestError(f"{error}.") from error
    return Layout(rows)


def _archives(source: str) -> list[str]:
    path = Path(source)
    if os.path.isdir(source):
        return [str(each.absolute()) for each in _inside(path)]
    names = list(itertools.islice(expand(source), MOST + 1))
    if len(names) > MOST:
        raise ManifestError(f"{source} stands for more than {MOST} shards: name a folder, or fewer.")
    if not names:
        raise ManifestError(f"{source} stands for no shard: write the smaller number first.")
    return [name if is_remote(name) else str(Path(name).absolute()) for name in names]


def _inside(folder: Path) -> list[Path]:
    found = [each for each in folder.iterdir() if each.suffix.lower() == ".tar" and not each.name.startswith(".")]
    return sorted(found, key=lambda each: by_number(each.name))


def expand(pattern: str) -> Iterator[str]:
    """The names that a pattern stands for: `{000..002}` counts, and `{a,b}` lists."""
    found = _BRACES.search(pattern)
    if found is None:
        yield pattern
        return
    options: Iterable[str] = found[1].split(",")
    if count := _COUNT.fullmatch(found[1]):
        first, last = count[1], count[2]
        options = (f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1))
    for option in options:
        yield from expand(pattern[: found.start()] + option + pattern[found.end() :])


def _is_part(name: str) -> bool:
    """Whether a file is of a sample: hidden ones, as macOS adds them, are not, and none without a suffix."""
    file = name.rpartition("/")[2]
    return "." in file and not file.startswith(".")


def _split(name: str) -> tuple[str, str]:
    """The name of a sample, with its folder, and what comes behind the first dot."""
    folder, slash, file = name.rpartition("/")
    key, _, rest = file.partition(".")
    return folder + slash + key, rest


def _row(group: list[Member], fields: Mapping[str, str], names: Mapping[str, str], where: str) -> Row:
    """A row of the files of a sample. names: fields by the keys of a .json that are called otherwise."""
    row: dict[str, object] = {}
    found: dict[tuple[str, int], Member] = {}
    for member in group:
        field, _, suffix = _split(member.name)[1].lower().rpartition(".")
        field = field or suffix
        numbered = _NUMBERED.fullmatch(field)
        if numbered:
            place = f"{numbered[1]}s", int(numbered[2])
        elif field in fields:
            place = fields[field], 0
        elif suffix == "json":
            record = _object(member, where)
            row |= {key: value for key, value in record.items() if key not in names.values()}
            row |= {field: record[key] for key, field in names.items() if key in record}
            continue
        else:
            continue
        if found.setdefault(place, member) != member:
            return [f"{where} has both {found[place].name} and {member.name}: leave one of them out."]
    numbers = {kind: {n: str(found[k, n]) for k, n in found if k == kind} for kind in ("references", "reference_masks")}
    references, masks = numbers["references"], numbers["reference_masks"]
    for field, _ in found:
        if field == "prompt":
            row["prompt"] = _text(found[field, 0], where)
        elif field not in numbers:
            row[field] = str(found[field, 0])
    for number in masks.keys() - references.keys():
        return [f"{where} has reference_mask{number} and no reference{number}: add that, or leave the mask out."]
    if references:
        row["references"] = [references[number] for number in sorted(references)]
    if masks:
        row["reference_masks"] = [masks.get(number) for number in sorted(references)]
    return row


def _text(member: Member, where: str) -> str:
    try:
        return member.read(TEXT_BYTES).decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ManifestError(f"{where} has a text that is none ({error}): write it in UTF-8.") from error


def _object(member: Member, where: str) -> dict[str, object]:
    try:
        record = json.loads(member.read(TEXT_BYTES), object_pairs_hook=once_each)
    except PictureError:
        raise
    except TwiceError as error:
        raise ManifestError(f"{where}.json {error}") from error
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{where}.json is no JSON ({error}).") from error
    if not isinstance(record, dict):
        raise ManifestError(f"{where}.json is no JSON object: write one as {{...}}.")
    return record
