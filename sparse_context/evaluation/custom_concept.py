"""CustomConcept101 (Kumari et al., CVPR 2023; arXiv 2212.04488): a reader of its files, and its metrics.

The folder is `customconcept101/` of the authors' code, with `benchmark_dataset/` unpacked into it: `dataset.json` lists
concepts, `dataset_multiconcept.json` pairs of them, each with a file of prompts, in which `{}` stands for the concept,
or `{0}` and `{1}`. A concept is a folder of 3 to 15 pictures.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..samples.layout import by_number, is_image
from .benchmark import Benchmark, BenchmarkSample
from .metrics import METRICS, Metric
from .subject_metrics import dino_metric, text_metric

SINGLE, MULTIPLE = "single concept", "multiple concepts"
SOURCE = "github.com/adobe-research/custom-diffusion"


def read_custom_concept(folder: str) -> list[BenchmarkSample]:
    """A sample for each prompt of each concept, and then of each pair.

    The first picture of a concept is its reference, and all of them are what outputs are compared with, as the
    benchmark has it. Groups are whether it is one concept, and its kind. Raises ValueError, in one sentence, for a
    folder of another kind and for an entry that is not as described.
    """
    path = Path(folder)
    samples = []
    for number, entry in enumerate(_entries(path / "dataset.json"), start=1):
        samples += _samples([entry], entry, "prompt_filename", path, f"dataset.json, entry {number}")
    pairs = path / "dataset_multiconcept.json"
    for number, entry in enumerate(_entries(pairs) if pairs.is_file() else [], start=1):
        where = f"{pairs.name}, entry {number}"
        if not isinstance(entry, list) or len(entry) < 2:
            raise ValueError(f"{path / where} is no list of concepts and of their prompts.")
        samples += _samples(entry[:-1], entry[-1], "prompt_filename_compose", path, where)
    return samples


def _entries(path: Path) -> list[Any]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path.parent} is no CustomConcept101 folder: {path.name} cannot be read ({error}); get the folder "
            f"customconcept101 from {SOURCE}."
        ) from error
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} holds no entries: it has to be a list of concepts.")
    return entries


def _samples(concepts: list[Any], entry: Any, prompts: str, folder: Path, where: str) -> list[BenchmarkSample]:
    try:
        file = folder / entry[prompts]
        names = [concept["class_prompt"] for concept in concepts]
        for name in names:
            if not isinstance(name, str):
                raise TypeError(f"class_prompt is {name!r}, which is no text")
        folders = [folder / concept["instance_data_dir"] for concept in concepts]
    except (KeyError, TypeError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{folder / where} is not as in CustomConcept101: {what}.") from error
    pictures = [_pictures(each) for each in folders]
    kinds = (each.name.partition("_")[0] for each in folders)
    groups = (SINGLE, *kinds) if len(concepts) == 1 else (MULTIPLE,)
    stem = "+".join(each.name for each in folders)
    return [
        BenchmarkSample(
            f"{stem}-{i:02}",
            _fill(line, names, f"{file}, line {i}"),
            tuple(each[0] for each in pictures),
            task="subject",
            groups=groups,
            targets=tuple(tuple(each) for each in pictures),
        )
        for i, line in _lines(file)
    ]


def _pictures(folder: Path) -> list[Path]:
    found = [each for each in folder.iterdir() if is_image(each.name)] if folder.is_dir() else []
    if not found:
        raise ValueError(f"The concept {folder} has no pictures: unpack benchmark_dataset.zip beside dataset.json.")
    return sorted(found, key=lambda path: by_number(path.name))


def _lines(file: Path) -> list[tuple[int, str]]:
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"The prompts {file} cannot be read ({error}): copy the folder prompts beside them."
        ) from error
    return [(i, line.strip()) for i, line in enumerate(lines, start=1) if line.strip()]


def _fill(prompt: str, names: list[str], where: str) -> str:
    """The prompt with the names of its concepts. A name is no pattern, so nothing in it is looked for again."""
    numbers: Mapping[str, str] = {"": names[0], **{str(i): name for i, name in enumerate(names)}}
    try:
        return re.sub(r"\{(\d*)\}", lambda found: numbers[found[1]], prompt)
    except KeyError as error:
        raise ValueError(f"{where} asks for concept {error}, and there are {len(names)}.") from error


CLIP = "openai/clip-vit-base-patch32"
METRICS_OF_CUSTOM_CONCEPT: dict[str, Metric] = {
    "text_alignment": text_metric(CLIP),
    "image_alignment": METRICS["clip_i"],
    "image_alignment_dino": dino_metric("facebook/dino-vits16"),
}

CUSTOM_CONCEPT = Benchmark(
    read_custom_concept,
    METRICS_OF_CUSTOM_CONCEPT,
    {name: (SINGLE, MULTIPLE) for name in METRICS_OF_CUSTOM_CONCEPT},
)
