"""What a benchmark is made of: samples from its folder, its metrics, its table, and what its judge is asked."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..samples import Picture, Sample
from .metrics import Metric


@dataclass(frozen=True)
class BenchmarkSample(Sample):
    """A sample of a benchmark.

    caption: what the picture to be made shows, where `prompt` says what to do instead; None: `prompt` says it.
    source_caption: what the first reference shows. groups: those of reports that it is in; none: its `task`. targets:
    for each subject the pictures that show it, where these are more than the references. size: width and height that
    the picture has to have; None: any.
    """

    caption: str | None = None
    source_caption: str | None = None
    groups: tuple[str, ...] = ()
    targets: tuple[tuple[Picture, ...], ...] = ()
    size: tuple[int, int] | None = None

    @property
    def text(self) -> str:
        """What the picture to be made shows, in words."""
        return self.prompt if self.caption is None else self.caption


Message = tuple[str, str]
"""Who says it, "user" or "assistant", and the text."""


@dataclass(frozen=True)
class Question:
    """One thing that a judge says of a picture, as a score from 0 to `most`.

    asked: whether it is asked of a sample. shows_references: whether the judge sees the references, before the picture.
    own: (sample) -> the question in the words of this library. published: (folder or file, sample) -> the same in those
    of the benchmark, from its authors' code; the pictures come behind the last message.
    """

    name: str
    most: int
    asked: Callable[[BenchmarkSample], bool]
    shows_references: bool
    own: Callable[[BenchmarkSample], list[Message]]
    published: Callable[[Path, BenchmarkSample], list[Message]]


@dataclass(frozen=True)
class Benchmark:
    """read: (folder) -> its samples. metrics: its own, by their names there. groups: what its table shows of a score
    apart from all samples, for scores that it does not show of every group. questions: what its judge is asked; none:
    it has no judge."""

    read: Callable[[str], Sequence[BenchmarkSample]]
    metrics: Mapping[str, Metric]
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    questions: Sequence[Question] = ()
