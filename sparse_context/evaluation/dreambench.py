"""DreamBench++ (Peng et al., ICLR 2025; arXiv 2406.16855): a reader of its folder, its metrics, and its judge.

The folder is the one that the authors hand out: `images/` and `captions/`, each with `live_subject/animal`,
`live_subject/human`, `object` and `style`, with files of the same names. A caption file has the subject in its first
line, and a prompt in each of the nine others: four photographs, three pictures in other styles, and two inventions.
"""

from pathlib import Path

from ..samples.layout import by_number, is_image
from .benchmark import Benchmark, BenchmarkSample, Message, Question
from .metrics import METRICS, Metric
from .subject_metrics import dino_metric

CATEGORIES = ("animal", "human", "object", "style")
KINDS = ("photorealistic",) * 4 + ("style transfer",) * 3 + ("imaginative",) * 2
"""What kind of prompt each of the nine is."""

SOURCE = "github.com/yuangpeng/dreambench_plus"


def read_dreambench(folder: str) -> list[BenchmarkSample]:
    """The samples of a DreamBench++ folder: nine of each picture, in the order of their names.

    A picture is the reference, its category and the kind of the prompt are the groups. Raises ValueError, in one
    sentence, for a folder of another kind and for captions that are not as described.
    """
    path = Path(folder)
    images = [each for each in (path / "images").rglob("*") if is_image(each.name) and each.is_file()]
    if not images:
        raise ValueError(
            f"{folder} is no DreamBench++ folder: it has no pictures below images/; get the benchmark from {SOURCE}."
        )
    samples = []
    for image in sorted(images, key=lambda each: by_number(each.as_posix())):
        place = image.relative_to(path / "images")
        category = image.parent.name
        if category not in CATEGORIES:
            raise ValueError(f"{image} is in no folder of {', '.join(CATEGORIES)}, as pictures of DreamBench++ are.")
        captions = path / "captions" / place.with_suffix(".txt")
        try:
            lines = captions.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{image} has no captions that can be read ({error}): put {captions} there.") from error
        subject, *prompts = [line.strip() for line in lines if line.strip()] or [""]
        if len(prompts) != len(KINDS):
            raise ValueError(f"{captions} has {len(prompts)} prompts, and not the {len(KINDS)} of DreamBench++.")
        stem = "_".join(place.with_suffix("").parts)
        for i, (prompt, kind) in enumerate(zip(prompts, KINDS, strict=True)):
            task = "global" if category == "style" else "subject"
            samples.append(
                BenchmarkSample(
                    f"{stem}-{i}", prompt, (image,), task=task, groups=(category, kind), source_caption=subject
                )
            )
    return samples


# Its judge ------------------------------------------------------------------------------------------------------------


def _is_style(sample: BenchmarkSample) -> bool:
    return "style" in sample.groups


def _own_subject(sample: BenchmarkSample) -> list[Message]:
    return [
        (
            "user",
            "The first image is a reference, the second was generated from it. Compare the subject of the two: outline "
            "and proportions, colours, surface and fine detail, and for people and animals the face. Ignore "
            "background, pose and scene.\n"
            "Score: 0 another subject, 1 the same kind only, 2 alike with clear differences, 3 the same with small "
            "differences, 4 cannot be told apart.\n"
            "Answer with one line: Score: N",
        )
    ]


def _own_style(sample: BenchmarkSample) -> list[Message]:
    return [
        (
            "user",
            "The first image is a reference for style, the second was generated in that style. Compare the style of "
            "the two: palette and tone, brushwork and texture, line and degree of abstraction. Ignore what is shown.\n"
            "Score: 0 another style, 1 little in common, 2 alike with clear differences, 3 the same with small "
            "differences, 4 cannot be told apart.\n"
            "Answer with one line: Score: N",
        )
    ]


def _own_prompt(sample: BenchmarkSample) -> list[Message]:
    return [
        (
            "user",
            f"The image was generated from this text: {sample.prompt}\n"
            "Judge whether it shows what the text says: the right things, with the details that are named, none left "
            "out, in the setting that is described. Ignore beauty.\n"
            "Score: 0 nothing of it, 1 a part in a loose sense, 2 several details are wrong or missing, 3 nearly all "
            "of it, 4 all of it.\n"
            "Answer with a short analysis and then one line: Score: N",
        )
    ]


def _published(kind: str, folder: Path, last: str) -> list[Message]:
    """The authors' own words, from the folder `dreambench_plus/prompts` of their code."""
    texts = []
    for speaker in ("user", "gpt"):
        file = folder / f"{speaker}_prompt_{kind}_full.txt"
        try:
            texts.append(file.read_text(encoding="utf-8").strip())
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{file} cannot be read ({error}): pass the folder dreambench_plus/prompts of {SOURCE}, or own."
            ) from error
    return [("user", texts[0]), ("assistant", texts[1]), ("user", last)]


QUESTIONS = (
    Question(
        "concept preservation",
        4,
        lambda sample: not _is_style(sample),
        True,
        _own_subject,
        lambda folder, sample: _published("subject", folder, ""),
    ),
    Question(
        "concept preservation",
        4,
        _is_style,
        True,
        _own_style,
        lambda folder, sample: _published("style", folder, ""),
    ),
    Question(
        "prompt following",
        4,
        lambda sample: True,
        False,
        _own_prompt,
        lambda folder, sample: _published("text", folder, sample.prompt),
    ),
)

METRICS_OF_DREAMBENCH: dict[str, Metric] = {
    "clip_i": METRICS["clip_i"],
    "clip_t": METRICS["clip_t"],
    "dino_v1": dino_metric("facebook/dino-vits8"),
    "dino_v2": METRICS["dino_i"],
}
"""The authors report all of them times 100."""

OF_CATEGORIES = (*CATEGORIES, "all")
DREAMBENCH = Benchmark(
    read_dreambench,
    METRICS_OF_DREAMBENCH,
    {
        "clip_i": OF_CATEGORIES,
        "dino_v1": OF_CATEGORIES,
        "dino_v2": OF_CATEGORIES,
        "clip_t": (*dict.fromkeys(KINDS), "all"),
    },
    QUESTIONS,
)
