"""OmniContext (Wu et al., OmniGen2; arXiv 2506.18871): a reader of its data set, and its judge.

The source is the folder, or the hub name, of the data set that the authors hand out, which the `datasets` library
reads: columns `key`, `task_type`, `instruction`, `instruction_language` and `input_images`. Outputs are 1024 pixels a
side. Its scores are those of a judge; CLIP-I, CLIP-T and DINO-I are taken beside them.
"""

import ast
from functools import lru_cache
from pathlib import Path

from ..samples import ManifestError, RowRules, Table, make_sample
from .benchmark import Benchmark, BenchmarkSample, Message, Question
from .metrics import METRICS, Metric

GROUPS = (
    "single_character",
    "single_object",
    "multi_character",
    "multi_object",
    "multi_character_object",
    "scene_character",
    "scene_object",
    "scene_character_object",
)
"""Its kinds of tasks, in the order of its table."""

COLUMNS = {"name": "key", "task": "task_type", "prompt": "instruction", "references": "input_images"}
SIDE = 1024
SOURCE = "github.com/VectorSpaceLab/OmniGen2"


def read_omnicontext(source: str) -> list[BenchmarkSample]:
    """The samples in English, which its scores are of, in the order of its table. Raises ValueError in one sentence."""
    folder = Path(source) if Path(source).is_dir() else None
    rules = RowRules(COLUMNS, needs_image=False, most_references=None, folder=folder, others=("instruction_language",))
    try:
        table = Table(source, "train", None, rules)
    except ManifestError as error:
        raise ValueError(f"{str(error).rstrip('.')}; get the data set OmniGen2/OmniContext.") from error
    samples = []
    for i, row in enumerate(map(table.row, range(len(table))), start=1):
        if row.get("instruction_language", "en") != "en":
            continue
        sample = make_sample(row, f"{source}, row {i}", f"{i:06}", rules)
        if isinstance(sample, list):
            raise ValueError(sample[0])
        if sample.task not in GROUPS:
            raise ValueError(f"{source}, row {i}: task_type is {sample.task!r}, and none of {', '.join(GROUPS)}.")
        samples.append(
            BenchmarkSample(
                f"{sample.task}-{sample.name}",  # a key may come again in another kind
                sample.prompt,
                sample.references,
                task="subject",
                groups=(sample.task,),
                size=(SIDE, SIDE),
            )
        )
    if not samples:
        raise ValueError(f"{source} holds no sample in English.")
    return sorted(samples, key=lambda sample: GROUPS.index(sample.groups[0]))


# Its judge ------------------------------------------------------------------------------------------------------------


def _has_scene(sample: BenchmarkSample) -> bool:
    return sample.groups[0].startswith("scene")


def _own(what: str, sample: BenchmarkSample) -> list[Message]:
    return [
        (
            "user",
            f"All images but the last are inputs, the last was generated from them. The instruction was: "
            f"{sample.prompt}\n{what}\nScore from 0 (not at all) to 10 (without a flaw), and be strict: take off a "
            'point for every difference.\nAnswer in JSON: {"score": N, "reasoning": "..."}',
        )
    ]


def _own_prompt(sample: BenchmarkSample) -> list[Message]:
    return _own(
        "Judge only whether the last image does what the instruction asks: composition, pose, action, and what is "
        "added or left out. Do not judge whether it shows the same individuals, objects or place, nor beauty.",
        sample,
    )


def _own_subject(sample: BenchmarkSample) -> list[Message]:
    also = " and the place of the input that shows it, with its layout, light and objects" if _has_scene(sample) else ""
    return _own(
        f"Judge only whether the last image shows the very individuals and objects that the instruction names{also}: "
        "face and head, hair, body, and clothes where the instruction does not change them. Do not judge pose, "
        "composition or how well the instruction was followed.",
        sample,
    )


@lru_cache(maxsize=4)
def _texts(file: Path) -> dict[str, str]:
    """The texts that the authors' omnicontext/prompt_generator.py assigns. It is read and not run."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, SyntaxError) as error:
        raise ValueError(
            f"{file} cannot be read ({error}): pass omnicontext/prompt_generator.py of {SOURCE}, or own."
        ) from error
    return {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def _published(kind: str, file: Path, sample: BenchmarkSample) -> list[Message]:
    texts = _texts(file)
    case = "Scene" if _has_scene(sample) else "Single_and_Multiple"
    names = ("_context_no_delimit", f"_prompts_0shot_in_context_generation_rule_{kind}_{case}")
    for name in names:
        if name not in texts:
            raise ValueError(f"{file} has no text {name}: pass omnicontext/prompt_generator.py of {SOURCE}, or own.")
    return [("user", "".join(texts[name] for name in names).replace("<instruction>", sample.prompt))]


QUESTIONS = (
    Question(
        "prompt following",
        10,
        lambda sample: True,
        True,
        _own_prompt,
        lambda file, sample: _published("PF", file, sample),
    ),
    Question(
        "subject consistency",
        10,
        lambda sample: True,
        True,
        _own_subject,
        lambda file, sample: _published("SC", file, sample),
    ),
)

METRICS_OF_OMNICONTEXT: dict[str, Metric] = {name: METRICS[name] for name in ("clip_i", "clip_t", "dino_i")}
OMNICONTEXT = Benchmark(
    read_omnicontext,
    METRICS_OF_OMNICONTEXT,
    {name: (*GROUPS, "all") for name in METRICS_OF_OMNICONTEXT},
    QUESTIONS,
)
