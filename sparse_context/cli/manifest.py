"""`sparse-context manifest`: data of any kind, written down as a manifest."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from . import options


def manifest(
    source: Annotated[
        str,
        typer.Argument(
            help="Folder or .zip of images, .yaml of ai-toolkit, .toml of musubi-tuner, shards/{000..099}.tar, or hub "
            "name."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Manifest to write, a .jsonl file.")],
    dataset_config_name: options.ConfigName = None,
    split: options.Split = "train",
    image_column: options.ImageColumn = "image",
    cond_image_column: options.CondImageColumn = "references",
    caption_column: options.CaptionColumn = "prompt",
) -> None:
    """Write the rows of other trainers' data, or of a data set, as a JSONL manifest that train and evaluate read.

    Images stay where they are. Those of a data set, which are in no file, are written into a folder beside the
    manifest.
    """
    from ..samples import read_samples, source_of, write_manifest

    if output.suffix.lower() != ".jsonl":
        raise ValueError(f"output is {output}: name a .jsonl file.")
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise ValueError(f"{output} cannot be written: name a file in a folder that exists.")
    if output.exists():  # and may be a part of the source
        raise ValueError(f"{output} is there and would be overwritten: name another file, or remove it first.")
    beside = os.path.realpath(output.with_suffix(""))  # where pictures go that are in no file
    if os.path.isdir(source) and os.path.commonpath([beside, os.path.realpath(source)]) == os.path.realpath(source):
        raise ValueError(f"{output} would have its pictures in {source}, which is the source: name another file.")
    named = source_of(dataset_config_name, split, image_column, cond_image_column, caption_column)
    samples = read_samples(source, needs_image=False, **named)
    for note in samples.notes:
        print(note, file=sys.stderr)
    write_manifest(samples, output)
    print(f"wrote {output}: {len(samples)} samples")
