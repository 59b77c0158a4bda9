"""What a judge is asked of the outputs of an evaluation, written down for whoever has one.

`judge.jsonl` has a line for each setting, sample and question:

    {"id": "dense/cat-0/prompt following", "setting": "dense", "sample": "cat-0", "groups": ["animal"],
     "question": "prompt following", "scale": [0, 4], "wording": "own",
     "messages": [{"role": "user", "content": [{"type": "text", "text": "..."}, {"type": "image", "path": "..."}]}]}

Paths are relative to the file: of references, in their order, and then of the output.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..images import save_text
from ..samples.write import name_picture
from .benchmark import BenchmarkSample, Question
from .evaluate import output_of

OWN = "own"
"""In the place of a folder of the authors' texts: the words of this library, whose scores compare with no others."""


def check_wording(questions: Sequence[Question], samples: Sequence[BenchmarkSample], wording: str) -> None:
    """Raise ValueError, before anything is made, where the authors' texts cannot be read."""
    for question in questions:
        for sample in samples:
            if question.asked(sample):
                _texts(question, sample, wording)


def write_questions(
    questions: Sequence[Question],
    samples: Sequence[BenchmarkSample],
    settings: Sequence[str],
    folder: Path,
    wording: str,
) -> Path:
    """Write `folder`/judge.jsonl, for outputs that are all in `folder`; its path.

    wording: "own", or where the authors' texts are. References that are in no file are written into `folder`/judge.
    """
    path = folder / "judge.jsonl"
    lines: list[dict[str, Any]] = []
    for sample in samples:
        references = [
            name_picture(each, path, folder / "judge" / f"{sample.name}-{n}")
            for n, each in enumerate(sample.references, start=1)
        ]
        for setting in settings:
            output = output_of(folder, setting, sample.name).relative_to(folder).as_posix()
            lines += _records(questions, sample, setting, references, output, wording)
    save_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), path)
    return path


def _records(
    questions: Sequence[Question],
    sample: BenchmarkSample,
    setting: str,
    references: Sequence[str],
    output: str,
    wording: str,
) -> Iterator[dict[str, Any]]:
    for question in questions:
        if not question.asked(sample):
            continue
        shown = [*(references if question.shows_references else []), output]
        images = [{"type": "image", "path": entry} for entry in shown]
        messages = [
            {"role": role, "content": [{"type": "text", "text": text}] if text else []}
            for role, text in _texts(question, sample, wording)
        ]
        messages[-1]["content"] = [*messages[-1]["content"], *images]
        yield {
            "id": f"{setting}/{sample.name}/{question.name}",
            "setting": setting,
            "sample": sample.name,
            "groups": list(sample.groups),
            "question": question.name,
            "scale": [0, question.most],
            "wording": OWN if wording == OWN else "published",
            "messages": messages,
        }


def _texts(question: Question, sample: BenchmarkSample, wording: str) -> list[tuple[str, str]]:
    return question.own(sample) if wording == OWN else question.published(Path(wording), sample)
