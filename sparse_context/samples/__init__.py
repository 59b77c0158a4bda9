"""Samples: what training and evaluation read. References and a prompt, and mostly the picture that should come of them.

A manifest is a JSONL file with one object a line:

    {"references": ["cat.png", "room.png"], "prompt": "the cat in the room", "image": "truth.png"}

- `references`: one or more pictures; `prompt`: text; `image`: the picture to be made (evaluation can do without).
- `mask`: where the object is in `image`; `reference_masks`: where it is in each reference, null for none.
- `aligned`: true where `image` keeps the layout of the first reference, as edits do (training may use it).
- `task`: a group for reports, such as "edit" or "subject"; `name`: unique, letters that a file name can have.

Paths are relative to the manifest, with slashes or, as Windows writes them, backslashes; one may lead into an archive
(archives.py). Other keys are ignored, unless they look like one of these misspelt.

In the place of a manifest, data of other trainers is read as the same rows (layouts.py). Any other folder and a hub
name are read with the `datasets` library; its columns have the same names, or those that `columns` says, and
`references` may hold one picture or a list. Pictures are opened when they are asked for.
"""

from .archives import Member
from .names import ILLEGAL, LONGEST_NAME, file_key, name_problem, same_file
from .read import (
    Samples,
    SourceOptions,
    check_pictures,
    check_samples,
    needs_datasets,
    read_samples,
    source_of,
)
from .rows import FIELDS, RowRules, find_picture, make_sample, read_lines
from .sample import ManifestError, Picture, Sample, open_any, open_any_mask
from .table import Table
from .write import write_manifest

__all__ = [
    "FIELDS",
    "ILLEGAL",
    "LONGEST_NAME",
    "ManifestError",
    "Member",
    "Picture",
    "RowRules",
    "Sample",
    "Samples",
    "SourceOptions",
    "Table",
    "check_pictures",
    "check_samples",
    "file_key",
    "find_picture",
    "make_sample",
    "name_problem",
    "needs_datasets",
    "open_any",
    "open_any_mask",
    "read_lines",
    "read_samples",
    "same_file",
    "source_of",
    "write_manifest",
]
