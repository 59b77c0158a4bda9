"""Samples: what training and evaluation read. References and a prompt, and mostly the picture that should come of them.

A manifest is a JSONL file with one object a line:

    {"references": ["cat.png", "room.png"], "prompt": "the cat in the room", "image": "truth.png"}

- `references`: one or more pictures; `prompt`: text; `image`: the picture to be made (evaluation can do without).
- `mask`: where the object is in `image`; `reference_masks`: where it is in each reference, null for none.
- `phrases`: what is meant in each reference, such as "the red car", null for none; one text is for all of them.
- `aligned`: true where `image` keeps the layout of the first reference, as edits do (training may use it).
- `task`: a group for reports, such as "edit" or "subject"; `name`: unique, letters that a file name can have.

Paths are relative to the manifest, with slashes or, as Windows writes them, backslashes. Other keys are ignored, unless
they look like one of these misspelt. In the place of a file, a folder or a hub name is read with the `datasets`
library; its columns have the same names, or those that `columns` says, and `references` may hold one picture or a list.
Pictures are opened when they are asked for.
"""

import difflib
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import Any, Protocol, TypedDict, TypeVar, Unpack

from PIL import Image

from .images import PictureError, open_mask, open_picture
from .layers import explain_missing_packages

FIELDS = ("references", "prompt", "image", "mask", "reference_masks", "phrases", "aligned", "task", "name")
FORMATS = ("arrow", "csv", "imagefolder", "json", "parquet")  # of the `datasets` library
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(?<!\.jsonl)(?<!\.json)")  # but a manifest that is missing is none

CHECKED = 250
"""As many samples have their pictures opened before a training: to open those of a large data set takes hours."""

DEVICES = {
    "con",
    "prn",
    "aux",
    "nul",
    "conin$",
    "conout$",
    *(f"{kind}{i}" for kind in ("com", "lpt") for i in "0123456789¹²³"),
}
"""What Windows opens in the place of a file, whatever comes after a dot."""

ILLEGAL = r'[/\\\x00-\x1f<>:"|?*]'
"""Characters that a file's name has not, on one system or another."""

LONGEST_NAME = 200  # bytes: file systems have 255, and a file that is being written has a longer one

Picture = Path | bytes
"""A picture that is not opened yet: a file, or the bytes of one."""


class ManifestError(ValueError):
    """Samples cannot be read. The message is one sentence that names the place and says what is wrong."""


@dataclass(frozen=True)
class Sample:
    """One sample; see the head of this file. The `open_*` methods raise `images.PictureError`."""

    name: str
    prompt: str
    references: tuple[Picture, ...]
    image: Picture | None = None
    mask: Picture | None = None
    reference_masks: tuple[Picture | None, ...] = ()
    task: str | None = None
    aligned: bool = False
    phrases: tuple[str | None, ...] = ()

    def open_references(self) -> list[Image.Image]:
        """The references in order, RGB or RGBA."""
        return [open_picture(reference) for reference in self.references]

    def open_image(self) -> Image.Image | None:
        """The picture to be made, RGB or RGBA; None without one."""
        return None if self.image is None else open_picture(self.image)

    def open_mask(self) -> Image.Image | None:
        """The object in `image`, mode L, of that picture's size; None without one."""
        image = None if self.mask is None else self.open_image()
        return None if self.mask is None or image is None else open_mask(self.mask, image.size)

    def open_reference_masks(self) -> list[Image.Image | None]:
        """The object in each reference, mode L: its mask, or else its own alpha channel, or None."""
        masks: list[Image.Image | None] = []
        sources = self.reference_masks or (None,) * len(self.references)
        for reference, mask in zip(self.open_references(), sources, strict=True):
            if mask is not None:
                masks.append(open_mask(mask, reference.size))
            else:
                masks.append(reference.getchannel("A") if reference.mode == "RGBA" else None)
        return masks


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
    """The samples of a JSONL manifest, of a folder that `datasets` reads, or of a hub name such as "owner/name".

    A manifest's rows are checked here (their pictures are not: see `check_samples`), those of `datasets` when they are
    taken. A hub name is fetched, because it was named. Raises `ManifestError`.
    """
    rows = _open_source(source, **options)
    if isinstance(rows, list):
        problems = [problem for _, sample in rows if isinstance(sample, list) for problem in sample]
        if problems:
            more = f" ({len(problems) - 1} more problems: check_samples lists them all)" if len(problems) > 1 else ""
            raise ManifestError(f"{source}, {problems[0].rstrip('.')}{more}.")
    return Samples(rows)


def check_samples(source: str | Path, **options: Unpack[SourceOptions]) -> list[str]:
    """Every bad row at once, pictures opened and all: one sentence each, with its line number; empty if all is well.

    Shows a progress bar. Raises `ManifestError` only where there are no rows to check.
    """
    problems: list[str] = []
    rows = _open_source(source, **options)
    opened: set[Picture] = set()
    for i in _progress(len(rows), "data", "row"):
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
    for i in _progress(count, "pictures", "sample"):
        sample = samples[i]
        problems = _bad_pictures(sample, opened) if i < CHECKED else _lost_pictures(sample)
        if problems:
            raise ManifestError(
                f"The sample {sample.name} cannot be used: {problems[0]} (check_samples names every bad row)."
            )


def _progress(count: int, name: str, unit: str) -> Iterable[int]:
    """0 to `count` - 1, with a progress bar where it takes more than two seconds."""
    with explain_missing_packages():
        from tqdm import tqdm
    return tqdm(range(count), desc=name, unit=unit, delay=2)


def needs_datasets(source: str | Path) -> bool:
    """Whether the `datasets` library reads this source."""
    path = Path(source)
    return path.is_dir() or bool(not path.is_file() and HUB_NAME.fullmatch(str(source)) and not path.parent.is_dir())


def name_problem(name: str) -> str | None:
    """What to do about a sample's name that no file can have on some system; None where all is well."""
    if not name.strip() or name in (".", ".."):
        return "write letters"
    if re.search(ILLEGAL, name):
        return 'leave out slashes, line ends and < > : " | ? *'
    if name[-1] in ". ":
        return "leave out the dot or space at its end"
    if name.split(".")[0].rstrip().casefold() in DEVICES:
        return "choose another, for Windows has a device of that name"
    return None


def same_file(names: Iterable[str]) -> tuple[str, str] | None:
    """The first two names that are those of one file on some system: Windows and macOS tell no capitals apart, and
    macOS no ways to write an accent."""
    found: dict[str, str] = {}
    for name in names:
        if file_key(name) in found:
            return found[file_key(name)], name
        found[file_key(name)] = name
    return None


def file_key(name: str) -> str:
    """Equal for names that are one file on some system."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def find_picture(entry: str, folder: Path) -> Path:
    """The file that `entry` names, relative to `folder`: with backslashes as Windows has them, where no file has these
    in its name."""
    path = folder / entry
    return folder / entry.replace("\\", "/") if "\\" in entry and not os.path.exists(path) else path


class Samples(Sequence[Sample]):
    """Rows as samples. A bad row raises `ManifestError` when it is taken.

    split, config: those of a data set that are read; None where the source has none.
    """

    def __init__(self, rows: "Rows") -> None:
        self._rows = rows
        self.split, self.config = (rows.split, rows.config) if isinstance(rows, _Table) else (None, None)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        _, sample = self._rows[i]
        if isinstance(sample, list):
            raise ManifestError(" ".join(sample))
        return sample


def _bad_pictures(sample: Sample, opened: set[Picture]) -> list[str]:
    """What is wrong with the pictures of a sample. Files in `opened` were good before and are not opened again."""
    problems: dict[str, None] = {}  # a set that keeps its order: a bad picture is also why its mask does not fit
    pictures = [*sample.references, *([] if sample.image is None else [sample.image])]
    attempts: list[Callable[[], object]] = [
        partial(open_picture, picture) for picture in pictures if picture not in opened
    ]
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
        opened.update(picture for picture in pictures if isinstance(picture, Path))
    return list(problems)


def _lost_pictures(sample: Sample) -> list[str]:
    pictures = (*sample.references, sample.image, sample.mask, *sample.reference_masks)
    lost = [picture for picture in pictures if isinstance(picture, Path) and not os.path.isfile(picture)]
    return [f"{str(picture)!r} does not exist; check the name and the folder" for picture in lost]


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


def _open_source(
    source: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    split: str = "train",
    config: str | None = None,
    needs_image: bool = True,
    most_references: int | None = None,
) -> Rows:
    unknown = [field for field in columns or {} if field not in FIELDS]
    if unknown:
        raise ManifestError(f"There is no field {unknown[0]!r} in a sample: the fields are {', '.join(FIELDS)}.")
    path = Path(source)
    folder = path.parent if path.is_file() else path if path.is_dir() else None
    rules = RowRules(columns or {}, needs_image, most_references, folder)
    if path.is_file():
        rows: Rows = read_lines(path, partial(make_sample, rules=rules))
    elif needs_datasets(source):
        rows = _Table(str(source), split, config, rules)
    else:
        raise ManifestError(
            f"The data {str(source)!r} does not exist: pass a JSONL manifest, a folder of a data set, or a hub name "
            "such as owner/name."
        )
    if not len(rows):
        raise ManifestError(f"{source} holds no sample: give it at least one.")
    return rows


# JSONL ----------------------------------------------------------------------------------------------------------------


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
    names: dict[str, tuple[int, str]] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"line {number}"
        try:
            value = json.loads(line, object_pairs_hook=_once_each)
        except ManifestError as error:
            row: Row | list[str] = [f"{where} {error}"]
        except (ValueError, RecursionError) as error:
            row = [f"{where} is no JSON ({error})."]
        else:
            row = make(value, where, f"{number:06}")
        if not isinstance(row, list):
            first, name = names.setdefault(file_key(row.name), (number, row.name))
            if first != number:
                other = "" if name == row.name else f", which is {name!r} on Windows or macOS,"
                row = [f"{where} has the name {row.name!r}{other} of line {first}: give each its own."]
        rows.append((where, row))
    return rows


def _once_each(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object. Python's own reader takes the last value of a key that comes twice, without a word."""
    entries: dict[str, object] = {}
    for key, value in pairs:
        if key in entries:
            raise ManifestError(f"has {_short(key)} twice: write it once.")
        entries[key] = value
    return entries


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


# The `datasets` library -----------------------------------------------------------------------------------------------


class _Table(Sequence):
    """The rows of a data set of the `datasets` library, each made into a sample when it is taken.

    split, config: those that are read. What `save_to_disk` wrote has no config, and a single table no split: None then.
    """

    split: str | None = None
    config: str | None = None

    def __init__(self, source: str, split: str, config: str | None, rules: RowRules) -> None:
        try:
            import datasets
        except ImportError as error:
            raise ManifestError(
                f"Reading {source} needs the datasets library: pip install 'sparse-context[train]', or pass a JSONL "
                "manifest."
            ) from error
        folder = rules.folder
        try:
            if folder is not None and any((folder / f).is_file() for f in ("dataset_info.json", "dataset_dict.json")):
                table = datasets.load_from_disk(source)
                if isinstance(table, datasets.DatasetDict):
                    if split not in table:  # as the library says it of the others
                        raise ValueError(f'Unknown split "{split}". Should be one of {list(table)}')
                    table, self.split = table[split], split
            else:
                builder = datasets.load_dataset_builder(source, config)
                kind = next((k for k in FORMATS for cls in type(builder).__mro__ if f".{k}." in cls.__module__), None)
                if kind is None:  # some of the others unpickle
                    raise ValueError(f"only {', '.join(FORMATS)} are read, for safety")
                builder.download_and_prepare()
                table = builder.as_dataset(split=split)
                self.split, self.config = split, builder.config.name
        except Exception as error:  # the library raises many kinds, and all of them mean this
            chain = [str(link) for link in (error, error.__cause__) if link is not None]
            reasons = [" ".join(text.split())[:300].rstrip(".") for text in chain]
            reason = ": ".join(filter(None, reasons)) or type(error).__name__
            raise ManifestError(f"The data set {source} does not load: {reason}.") from error
        for field in ("references", "prompt", *(["image"] if rules.needs_image else []), *rules.columns):
            if rules.column(field) not in table.column_names:
                also = " A JSONL manifest is named by its own file." if folder and any(folder.glob("*.jsonl")) else ""
                raise ManifestError(
                    f"The data set {source} has no column {rules.column(field)!r} for the field {field!r}: its columns "
                    f"are {', '.join(table.column_names)}.{also}"
                )
        names = [rules.column(field) for field in FIELDS]
        table = table.select_columns([name for name in names if name in table.column_names])
        for name in table.column_names:  # so that a picture is decoded here, by images.py, and by nothing else
            feature = table.features[name]
            if isinstance(feature, datasets.Image):
                table = table.cast_column(name, datasets.Image(decode=False))
            elif isinstance(getattr(feature, "feature", None), datasets.Image):
                table = table.cast_column(name, datasets.List(datasets.Image(decode=False)))
        self._table, self._rules = table, rules

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, i):
        i = range(len(self))[i]
        where = f"row {i + 1}"
        return where, make_sample(self._table[i], where, f"{i + 1:06}", self._rules)
