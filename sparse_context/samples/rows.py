"""Rows of a source, made into samples, or into everything that is wrong with them."""

import difflib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Protocol, TypeVar

from ..texts import TwiceError, once_each
from .archives import Member, find_member
from .names import file_key, name_problem
from .sample import ManifestError, Picture, Sample

FIELDS = ("references", "prompt", "image", "mask", "reference_masks", "phrases", "aligned", "task", "name")

Rows = Sequence[tuple[str, Sample | list[str]]]
"""Where a row is, for messages, and the sample that it makes or everything that is wrong with it."""


@dataclass(frozen=True)
class RowRules:
    """What the rows of a source have to hold. The fields are those of `SourceOptions`, and:

    folder: that of the manifest or data set, which paths are relative to; None for a data set that is in no folder.
    needs_references: whether a row without references is an error. others: keys that are known beside the fields.
    """

    columns: Mapping[str, str]
    needs_image: bool
    most_references: int | None
    folder: Path | None
    needs_references: bool = True
    others: tuple[str, ...] = ()

    def column(self, field: str) -> str:
        """The source's name of a field."""
        return self.columns.get(field, field)


class Named(Protocol):
    """What has a name that no other row of a manifest has."""

    @property
    def name(self) -> str: ...


Row = TypeVar("Row", bound=Named)


def read_lines(path: Path, make: Callable[[object, str, str], Row | list[str]]) -> list[tuple[str, Row | list[str]]]:
    """The lines of a JSONL file that hold something: where each is, and what `make(value, where, name)` makes of it or
    everything that is wrong with it. name: for one that has none. Raises `ManifestError` for a file that is no text."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"The manifest {path} cannot be read as text ({error}): pass JSONL in UTF-8.") from error
    rows: list[tuple[str, Row | list[str]]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"line {number}"
        try:
            value = json.loads(line, object_pairs_hook=once_each)
        except TwiceError as error:
            row: Row | list[str] = [f"{where} {error}"]
        except (ValueError, RecursionError) as error:
            row = [f"{where} is no JSON ({error})."]
        else:
            row = make(value, where, f"{number:06}")
        rows.append((where, row))
    return name_apart(rows)


def name_apart(rows: Sequence[tuple[str, Row | list[str]]]) -> list[tuple[str, Row | list[str]]]:
    """The rows; in the place of one with the name of a row before it, what is wrong with that."""
    first: dict[str, tuple[str, Row]] = {}
    apart: list[tuple[str, Row | list[str]]] = []
    for where, row in rows:
        if not isinstance(row, list):
            place, other = first.setdefault(file_key(row.name), (where, row))
            if other is not row:
                also = "" if other.name == row.name else f", which is {other.name!r} on Windows or macOS,"
                row = [f"{where} has the name {row.name!r}{also} of {place}: give each its own."]
        apart.append((where, row))
    return apart


def make_sample(row: object, where: str, name: str, rules: RowRules) -> Sample | list[str]:
    """A sample from a row of any source, or everything that is wrong with the row. name: where the row has none."""
    if not isinstance(row, Mapping):
        return [f"{where} is no JSON object: write one as {{...}}, on a line of its own."]
    value = {field: row.get(rules.column(field)) for field in FIELDS}
    references = [] if value["references"] in (None, [], "") else _as_list(value["references"])
    masks = [] if value["reference_masks"] is None else _as_list(value["reference_masks"])
    phrases = _each_phrase(value["phrases"], len(references))
    problems = [
        *_misspelt_keys(row, where, rules),
        *_missing_values(value, references, masks, phrases, where, rules),
        *(problem for field in ("name", "prompt", "task") for problem in _bad_text(value[field], field, where, rules)),
        *(problem for phrase in phrases for problem in _bad_text(phrase, "phrases", where, rules)),
        *_bad_paths(references, "references", where, rules),
        *_bad_paths([mask for mask in masks if mask is not None], "reference_masks", where, rules),
    ]
    for field in ("image", "mask"):
        if value[field] is not None:
            problems += _bad_paths([value[field]], field, where, rules)
    if not isinstance(value["aligned"], bool | None):
        problems.append(f"{where}: {rules.column('aligned')!r} is {_short(value['aligned'])}: write true or false.")
    if problems:
        return problems
    return Sample(
        value["name"] or name,
        value["prompt"] or "",
        tuple(_as_picture(reference, rules.folder) for reference in references),  # type: ignore[misc]
        _as_picture(value["image"], rules.folder),
        _as_picture(value["mask"], rules.folder),
        tuple(_as_picture(mask, rules.folder) for mask in masks),
        value["task"],
        bool(value["aligned"]),
        tuple(phrases),  # type: ignore[arg-type]
    )


def _as_list(entry: object) -> list[object]:
    return entry if isinstance(entry, list) else [entry]


def _each_phrase(entry: object, references: int) -> list[object]:
    """One phrase for each reference, or as many as a row has; none where it says nothing."""
    return [] if entry is None else entry if isinstance(entry, list) else [entry] * max(references, 1)


def _misspelt_keys(row: Mapping[str, object], where: str, rules: RowRules) -> Iterator[str]:
    """Keys of a file's row that look like a field which the row has not."""
    columns = [*(rules.column(field) for field in FIELDS), *rules.others]
    for key in row if rules.folder is not None else ():
        near = difflib.get_close_matches(str(key).lower(), columns, n=1, cutoff=0.8)
        if key not in columns and near and row.get(near[0]) is None:
            yield f"{where} has {key!r}: write {near[0]!r}."


def _missing_values(
    value: Mapping[str, object],
    references: list[object],
    masks: list[object],
    phrases: list[object],
    where: str,
    rules: RowRules,
) -> Iterator[str]:
    """What a row has too few or too many of."""
    if not references and rules.needs_references:
        yield f"{where} has no {rules.column('references')!r}: list at least one picture."
    if masks and len(masks) != len(references):
        yield f"{where} has {len(masks)} reference masks for {len(references)} references: write as many."
    if isinstance(value["phrases"], list) and len(phrases) != len(references):
        yield f"{where} has {len(phrases)} phrases for {len(references)} references: write as many, or one text."
    if rules.most_references is not None and len(references) > rules.most_references:
        most = rules.most_references
        yield f"{where} has {len(references)} references, and the model takes at most {most}: list fewer."
    if value["prompt"] is None:
        yield f"{where} has no {rules.column('prompt')!r}."
    if value["image"] is None and rules.needs_image:
        yield f"{where} has no {rules.column('image')!r}, the picture to be made."
    if value["mask"] is not None and value["image"] is None:
        yield f"{where} has a mask but no {rules.column('image')!r} that it could belong to."


def _bad_text(text: object, field: str, where: str, rules: RowRules) -> Iterator[str]:
    """Why this is no text for a field."""
    if text is None:
        return
    if not isinstance(text, str):
        yield f"{where}: {rules.column(field)!r} is {_short(text)}: write text."
    elif re.search("[\ud800-\udfff]", text):  # no tokenizer takes that
        yield f"{where}: {rules.column(field)!r} holds half of a character (a lone surrogate): write it whole."
    elif field == "phrases" and not (text.strip() and text.isprintable()):
        yield f"{where}: {rules.column(field)!r} has {_short(text)}: write what to look for, on one line, or null."
    elif field == "name" and (advice := name_problem(text)):
        yield f"{where}: the name {text!r} cannot be that of a file: {advice}."


def _bad_paths(entries: Sequence[object], field: str, where: str, rules: RowRules) -> Iterator[str]:
    """Those of a field's entries that are no picture of this system."""
    for entry in entries:
        picture = _as_picture(entry, rules.folder)
        if picture is None:
            yield f"{where}: {rules.column(field)!r} has {_short(entry)} where the path of a picture belongs."
        elif isinstance(picture, Path) and _is_elsewhere(entry, picture):
            yield (
                f"{where}: {rules.column(field)!r} has {_short(entry)}, a path of a Windows machine: write it relative "
                "to the manifest."
            )


def find_picture(entry: str, folder: Path) -> Path | Member:
    """The file that `entry` names, relative to `folder`, or the one inside an archive: with backslashes as Windows has
    them, where no file has these in its name."""
    path = folder / entry
    if "\\" in entry and not os.path.exists(path):
        path = folder / entry.replace("\\", "/")
    return find_member(entry, folder) or path


def _as_picture(entry: object, folder: Path | None) -> Picture | None:
    if isinstance(entry, Mapping):  # how `datasets` gives a picture that it does not decode
        entry = entry.get("bytes") or entry.get("path")
    if isinstance(entry, bytes):
        return entry
    return find_picture(entry, folder or Path()) if isinstance(entry, str) and entry and "\0" not in entry else None


def _is_elsewhere(entry: object, picture: Path) -> bool:
    """Whether a path begins with a drive, or a share, that this system has not."""
    if isinstance(entry, Mapping):
        entry = entry.get("path")
    return (
        os.name != "nt"
        and not str(entry).startswith("/")
        and PureWindowsPath(str(entry)).is_absolute()
        and not os.path.exists(picture)  # which, unlike pathlib's, takes names that are too long
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
