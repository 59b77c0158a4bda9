"""A source, read as samples."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, Unpack

from ..images import PictureError
from .archives import Member
from .layouts import LAYOUTS, find_layout
from .progress import progress
from .rows import FIELDS, RowRules, Rows, make_sample, name_apart, read_lines
from .sample import ManifestError, Picture, Sample, open_any
from .table import Table

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(?<!\.jsonl)(?<!\.json)")  # but a manifest that is missing is none

CHECKED = 250
"""As many samples have their pictures opened before a training: to open those of a large data set takes hours."""


class SourceOptions(TypedDict, total=False):
    """How a source is read, as keywords of `read_samples` and `check_samples`.

    columns: the source's own name of a field, for those that differ: {"prompt": "instruction"}. split ("train"), config
    (None): of the `datasets` library; what has none, such as a manifest, ignores them. needs_image (True): whether a
    sample without `image` is an error. most_references (None): how many references a sample may have; None: any number.
    """

    columns: Mapping[str, str] | None
    split: str
    config: str | None
    needs_image: bool
    most_references: int | None


def source_of(config_name: str | None, split: str, image: str, references: str, prompt: str) -> dict[str, Any]:
    """Which part of a data set is read, and by which columns for its fields: keywords of `read_samples`."""
    columns = {"image": image, "references": references, "prompt": prompt}
    columns = {field: column for field, column in columns.items() if field != column}
    return {"columns": columns, "split": split, "config": config_name}


def read_samples(source: str | Path, **options: Unpack[SourceOptions]) -> "Samples":
    """The samples of a JSONL manifest, of data in one of `layouts.LAYOUTS`, of a folder that `datasets` reads, or of a
    hub name such as "owner/name".

    Rows are checked here (their pictures are not: see `check_samples`), those of `datasets` when they are taken. A hub
    name or a URL is fetched, because it was named. Raises `ManifestError`.
    """
    rows, notes = _open_source(source, **options)
    if isinstance(rows, list):
        problems = [problem for _, sample in rows if isinstance(sample, list) for problem in sample]
        if problems:
            more = f" ({len(problems) - 1} more problems: check_samples lists them all)" if len(problems) > 1 else ""
            raise ManifestError(f"{source}, {problems[0].rstrip('.')}{more}.")
    return Samples(rows, notes)


def check_samples(source: str | Path, **options: Unpack[SourceOptions]) -> list[str]:
    """Every bad row at once, pictures opened and all: one sentence each, with its line number; empty if all is well.

    Shows a progress bar. Raises `ManifestError` only where there are no rows to check.
    """
    problems: list[str] = []
    rows, _ = _open_source(source, **options)
    opened: set[Picture] = set()
    for i in progress(len(rows), "data", "row"):
        where, sample = rows[i]
        if isinstance(sample, list):
            problems += sample
        else:
            problems += [f"{where}: {problem}." for problem in _bad_pictures(sample, opened)]
    return problems


def check_pictures(samples: "Samples") -> None:
    """Raise `ManifestError` that names a sample whose pictures cannot be used: those of the first `CHECKED` are opened,
    and of the rest of a manifest all have to be there. Shows a progress bar."""
    opened: set[Picture] = set()
    rows = samples._rows
    count = len(rows) if isinstance(rows, list) else min(len(rows), CHECKED)  # to take a row of a data set costs more
    for i in progress(count, "pictures", "sample"):
        sample = samples[i]
        problems = _bad_pictures(sample, opened) if i < CHECKED else _lost_pictures(sample)
        if problems:
            raise ManifestError(
                f"The sample {sample.name} cannot be used: {problems[0]} (check_samples names every bad row)."
            )


def needs_datasets(source: str | Path) -> bool:
    """Whether the `datasets` library reads this source."""
    if find_layout(source) is not None:
        return False
    path = Path(source)
    return os.path.isdir(source) or bool(
        not os.path.isfile(source) and HUB_NAME.fullmatch(str(source)) and not os.path.isdir(path.parent)
    )


class Samples(Sequence[Sample]):
    """Rows as samples. A bad row raises `ManifestError` when it is taken.

    split, config: those of a data set that are read; None where the source has none. notes: what the source says that
    is not used, a sentence each.
    """

    def __init__(self, rows: Rows, notes: Sequence[str] = ()) -> None:
        self._rows = rows
        self.split, self.config = (rows.split, rows.config) if isinstance(rows, Table) else (None, None)
        self.notes = tuple(notes)

    @property
    def shards(self) -> list[str] | None:
        """The .tar that the pictures of each sample are in; None where some are in none, or where rows are made when
        they are taken."""
        if not isinstance(self._rows, list):
            return None
        found = [_shard(sample) for sample in self]
        return None if None in found else found  # type: ignore[return-value]

    @property
    def aligned(self) -> bool | None:
        """Whether any sample is aligned; None where rows are made when they are taken, and so nobody knows."""
        if not isinstance(self._rows, list):
            return None
        return any(row.aligned for _, row in self._rows if not isinstance(row, list))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        _, sample = self._rows[i]
        if isinstance(sample, list):
            raise ManifestError(" ".join(sample))
        return sample


def _shard(sample: Sample) -> str | None:
    first = sample.references[0] if sample.references else sample.image
    return first.archive if isinstance(first, Member) and first.archive.lower().endswith(".tar") else None


def _bad_pictures(sample: Sample, opened: set[Picture]) -> list[str]:
    """What is wrong with the pictures of a sample. Files in `opened` were good before and are not opened again."""
    problems: dict[str, None] = {}  # a set that keeps its order: a bad picture is also why its mask does not fit
    pictures = [*sample.references, *([] if sample.image is None else [sample.image])]
    attempts: list[Callable[[], object]] = [partial(open_any, picture) for picture in pictures if picture not in opened]
    if sample.mask is not None:
        attempts.append(sample.open_mask)
    if sample.reference_masks:
        attempts.append(sample.open_reference_masks)
    for attempt in attempts:
        try:
            attempt()
        except PictureError as error:
            problems[str(error)] = None
    if not problems:
        opened.update(picture for picture in pictures if not isinstance(picture, bytes))
    return list(problems)


def _lost_pictures(sample: Sample) -> list[str]:
    pictures = (*sample.references, sample.image, sample.mask, *sample.reference_masks)
    lost = []
    for picture in pictures:
        member = picture if isinstance(picture, Member) and not picture.remote else None
        file = Path(member.archive) if member else picture
        try:
            if isinstance(file, Path) and not os.path.isfile(file):
                lost.append(f"{str(file)!r} does not exist; check the name and the folder")
            elif member and not member.is_there():
                lost.append(f"{str(member)!r} does not exist; check the name, and what the archive holds")
        except PictureError as error:
            lost.append(str(error))
    return lost


def _open_source(
    source: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    split: str = "train",
    config: str | None = None,
    needs_image: bool = True,
    most_references: int | None = None,
) -> tuple[Rows, Sequence[str]]:
    unknown = [field for field in columns or {} if field not in FIELDS]
    if unknown:
        raise ManifestError(f"There is no field {unknown[0]!r} in a sample: the fields are {', '.join(FIELDS)}.")
    path = Path(source)
    folder = path.parent if os.path.isfile(source) else path if os.path.isdir(source) else None
    rules = RowRules(columns or {}, needs_image, most_references, folder)
    kind = find_layout(source)
    notes: Sequence[str] = ()
    if kind is not None:
        renamed = [f"{field} as {column}" for field, column in (columns or {}).items() if column != field]
        if renamed and kind is not LAYOUTS["shards"]:
            raise ManifestError(f"{source} has names of its own for its fields: leave {', '.join(renamed)} out.")
        layout = kind.read(str(source), columns or {})
        rules, notes = RowRules({}, needs_image, most_references, Path()), layout.notes
        rows: Rows = name_apart(
            [
                (where, row if isinstance(row, list) else make_sample(row, where, f"{number:06}", rules))
                for number, (where, row) in enumerate(layout.rows, start=1)
            ]
        )
    elif os.path.isfile(source):  # which, unlike pathlib's, takes names that are too long
        rows = read_lines(path, partial(make_sample, rules=rules))
    elif needs_datasets(source):
        rows = table = Table(str(source), split, config, rules)
        notes = table.notes
    else:
        raise ManifestError(
            f"The data {str(source)!r} does not exist: pass a JSONL manifest, a folder or a .zip of images, a .toml or "
            ".yaml of another trainer, shards/{000..099}.tar, or a hub name such as owner/name."
        )
    if not len(rows):
        raise ManifestError(f"{source} holds no sample: give it at least one.")
    return rows, notes
