"""The training data of `runs/train_klein_*.sh` as one manifest: subjects in pairs, and edits.

    python runs/prepare_klein_data.py data/klein [--subjects 20000] [--edits 8807]

Fetches two data sets by name with the `datasets` library (pip install 'sparse-context[train]'):

- Yuanshi/Subjects200K (Apache-2.0): one picture of 1056 x 528 pixels holds two views of a subject, 512 x 512 each.
  Rows that its authors scored at least 5 in all three respects are taken, in one direction drawn by row.
- osunlp/MagicBrush (CC-BY 4.0): a photograph, an instruction, and the edited photograph.

Written are lossless webp files, `train.jsonl` and, of the last 64 of each, `validation.jsonl`.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

VIEWS = ((8, 8, 520, 520), (528, 8, 1040, 520))  # of a pair in Subjects200K's picture
SCORES = ("compositeStructure", "objectConsistency", "imageQuality")
HELD_OUT = 64


def subject_sample(row: dict, number: int) -> tuple[dict, dict[str, Image.Image]] | None:
    """A manifest row and its pictures from a row of Subjects200K, or None for one that is not good enough."""
    scores, says = row.get("quality_assessment"), row.get("description")
    if not scores or not says or row["image"].size != (1056, 528) or any((scores.get(s) or 0) < 5 for s in SCORES):
        return None
    first, second = VIEWS if number % 2 else VIEWS[::-1]
    prompt = says.get("description_1" if number % 2 else "description_0")
    if not prompt or not says.get("item"):
        return None
    pictures = {"reference": row["image"].crop(first), "image": row["image"].crop(second)}
    return {"prompt": f"{prompt} The {says['item']} is the one of image 1.", "task": "subject"}, pictures


def edit_sample(row: dict, number: int) -> tuple[dict, dict[str, Image.Image]]:
    """A manifest row and its pictures from a row of MagicBrush."""
    pictures = {"reference": row["source_img"], "image": row["target_img"]}
    return {"prompt": row["instruction"], "task": "edit"}, pictures


def write_samples(rows, make, name: str, count: int, folder: Path) -> Iterator[dict]:
    """Write the pictures of the first `count` good rows, and yield their manifest rows."""
    written = 0
    for number, row in enumerate(tqdm(rows, desc=name, unit="row")):
        made = make(row, number)
        if made is None:
            continue
        sample, pictures = made
        stem = f"{name}-{number:06}"
        for part, picture in pictures.items():
            file = folder / f"{stem}-{part}.webp"
            if not file.is_file():  # run again after an interruption, it goes on
                partial = file.with_suffix(".partial")
                picture.convert("RGB").save(partial, "WEBP", lossless=True, method=0)
                partial.replace(file)
        yield {"name": stem, "references": [f"{stem}-reference.webp"], "image": f"{stem}-image.webp", **sample}
        written += 1
        if written == count:
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--subjects", type=int, default=20_000)
    parser.add_argument("--edits", type=int, default=8_807)
    arguments = parser.parse_args()
    from datasets import load_dataset

    arguments.folder.mkdir(parents=True, exist_ok=True)
    sources = (
        ("Yuanshi/Subjects200K", subject_sample, "subject", arguments.subjects),
        ("osunlp/MagicBrush", edit_sample, "edit", arguments.edits),
    )
    train: list[dict] = []
    validation: list[dict] = []
    for hub_name, make, name, count in sources:
        rows = load_dataset(hub_name, split="train", streaming=True)
        samples = list(write_samples(rows, make, name, count + HELD_OUT, arguments.folder))
        train += samples[:-HELD_OUT]
        validation += samples[-HELD_OUT:]
    order = np.random.default_rng(0).permutation(len(validation))  # so that the first few show both tasks
    for file, samples in (("train.jsonl", train), ("validation.jsonl", [validation[i] for i in order])):
        partial = arguments.folder / f"{file}.partial"
        partial.write_text("".join(json.dumps(sample) + "\n" for sample in samples), encoding="utf-8", newline="\n")
        partial.replace(arguments.folder / file)
    print(f"{len(train)} samples in {arguments.folder / 'train.jsonl'}")


if __name__ == "__main__":
    main()
