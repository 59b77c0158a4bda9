"""The jobs of a batch: a JSONL file with one object a line.

    {"references": ["cat.png", "room.png"], "prompt": "the cat in the room", "keep": 0.1, "seed": 3, "name": "cat-3"}

- The keys of a manifest (samples.py): `references` (none for a picture from text alone), `prompt`, `name` (of the
  output; else the number of the line), `task`, `phrases`, and `reference_masks` for the selector "mask".
- Every setting of a request (`settings_file.REQUEST_KEYS`), such as `keep`, `selector`, `seed` or `steps`, goes over
  those of the whole batch. A `task` that is none of the library's is a group of a manifest, and changes nothing.
- `inpaint`: a mask of where to paint, for models that paint into their first reference.

Paths are relative to the file. Other keys are ignored, unless they look like one of these misspelt.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..config import TASKS
from ..pipelines.settings_file import MODEL_KEYS, REQUEST_KEYS, Settings, parse_settings
from ..pipelines.spec import Request
from ..samples import (
    FIELDS,
    LONGEST_NAME,
    ManifestError,
    Picture,
    RowRules,
    Sample,
    make_sample,
    open_any_mask,
    read_lines,
)
from ..selectors.masks import mask as masks_of
from ..selectors.registry import SelectorsLike

SETTINGS = tuple(key for key in REQUEST_KEYS if key not in FIELDS)  # prompt, task, phrases are fields of a sample too
PLACES = ("device", "cpu_offload")  # settings that say where to compute, which makes no other picture
OTHERS = (*SETTINGS, "inpaint")
"""Keys of a job beside those of a manifest."""


@dataclass(frozen=True)
class Job:
    """One job.

    where: its line, for messages. settings: model and request, without the pictures. ignored: keys of no meaning here.
    """

    where: str
    sample: Sample
    settings: Settings
    inpaint: Picture | None = None
    ignored: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of its output, unique in its file."""
        return self.sample.name

    @property
    def pictures(self) -> list[Picture]:
        """Every picture that it reads."""
        sources = [*self.sample.references, *self.sample.reference_masks, self.inpaint]
        return [source for source in sources if source is not None]

    def digest(self) -> str:
        """What it is told apart by, but for the content of its pictures: its prompt, its settings and the model."""
        settings = {key: value for key, value in self.settings.to_dict().items() if key not in PLACES}
        pictures = [len(self.sample.references), *(mask is not None for mask in self.sample.reference_masks)]
        record = json.dumps([settings, pictures, self.inpaint is not None], sort_keys=True)
        return hashlib.sha256(record.encode("utf-8", "surrogatepass")).hexdigest()[:16]

    def read(self) -> Request:
        """The request, with its pictures. Raises PictureError, and ValueError for masks that do not fit."""
        references = self.sample.open_references()
        config = self.settings.request.config
        if self.sample.reference_masks:
            masks = self.sample.open_reference_masks()
            config = replace(config, selector=_with_masks(config.selector, masks))
        inpaint = None if self.inpaint is None else open_any_mask(self.inpaint, references[0].size)
        return replace(self.settings.request, references=references, config=config, inpaint=inpaint)


@dataclass(frozen=True)
class BadLine:
    """A line that is no job, and everything that is wrong with it."""

    where: str
    problems: tuple[str, ...]


def read_jobs(path: Path, base: Settings) -> list[Job | BadLine]:
    """The jobs of a file, in order. base: the model and the settings that hold where a job says nothing else.

    Raises `ManifestError` for a file that holds no job at all.
    """
    if not path.is_file():
        raise ManifestError(f"The jobs {str(path)!r} do not exist: pass a JSONL file with one job a line.")
    rules = RowRules(
        {}, needs_image=False, most_references=None, folder=path.parent, needs_references=False, others=OTHERS
    )
    rows = read_lines(path, partial(_make_job, base=base, rules=rules))
    jobs = [BadLine(where, tuple(row)) if isinstance(row, list) else row for where, row in rows]
    if not any(isinstance(job, Job) for job in jobs):
        first = f": {jobs[0].problems[0].rstrip('.')}" if jobs and isinstance(jobs[0], BadLine) else ""
        raise ManifestError(f"{path} holds no job{first}.")
    return jobs


def _make_job(row: object, where: str, name: str, base: Settings, rules: RowRules) -> Job | list[str]:
    if not isinstance(row, Mapping):
        return [f"{where} is no JSON object: write one as {{...}}."]
    for key in MODEL_KEYS:
        if key in row:
            return [f"{where} has {key!r}, which is one for all jobs: pass it to the command."]
    if "text" in row:
        return [f"{where} has 'text', which is the command's name for it: write 'phrases'."]
    values = {key: row[key] for key in SETTINGS if key in row}
    fields: dict[str, Any] = dict(row)
    if isinstance(row.get("task"), list) or row.get("task") in TASKS:
        values["task"] = fields.pop("task")
    sample = make_sample(fields, where, name, rules)
    if isinstance(sample, list):
        return sample
    if len(sample.name.encode("utf-8", "surrogatepass")) > LONGEST_NAME:
        return [
            f"{where}: the name {sample.name[:40]!r}... is too long for a file: write {LONGEST_NAME} bytes at most."
        ]
    if sample.phrases:
        values["phrases"] = [*sample.phrases]
    inpaint = None
    if row.get("inpaint") is not None:
        mask = make_sample({"references": [row["inpaint"]], "prompt": ""}, where, name, rules)
        if isinstance(mask, list):
            return [problem.replace("'references'", "'inpaint'") for problem in mask]
        if not sample.references:
            return [f"{where}: inpaint says where to paint in the first reference, but there is none: name one."]
        inpaint = mask.references[0]
    try:
        settings = parse_settings({**values, "prompt": sample.prompt}, base)
    except ValueError as error:
        return [f"{where}: {error}"]
    ignored = tuple(str(key) for key in row if key not in (*FIELDS, *OTHERS))
    if any(mask is not None for mask in sample.reference_masks) and not _reads_masks(settings.request.config.selector):
        ignored += ("reference_masks (without the selector mask)",)
    return Job(where, sample, settings, inpaint, ignored)


def _reads_masks(selector: SelectorsLike) -> bool:
    if isinstance(selector, (list, tuple)):
        return any(map(_reads_masks, selector))
    return "mask" in selector if isinstance(selector, Mapping) else selector == "mask"


def _with_masks(selector: SelectorsLike, masks: Sequence[Any]) -> SelectorsLike:
    """`selector` with the masks of the references where it names "mask"."""
    if isinstance(selector, (list, tuple)):
        if len(selector) != len(masks):
            return selector  # which is refused where tokens are selected
        return [_with_masks(each, [mask]) for each, mask in zip(selector, masks, strict=True)]  # type: ignore[misc]
    if isinstance(selector, Mapping):
        return {masks_of(masks) if part == "mask" else part: weight for part, weight in selector.items()}
    return masks_of(masks) if selector == "mask" else selector
