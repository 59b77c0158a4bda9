"""What a search for a safe keep (recommend.py) found: as records, as text and as a sheet of pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..config import SparseContextConfig
from ..images import open_picture
from ..preview import column, label, side_by_side
from ..samples import Sample
from .grid import DENSE

SHOWN_SAMPLES = 3
SIDE = 192  # of a picture on the sheet, in pixels


@dataclass(frozen=True)
class Tried:
    """One setting that was tried. scores: the worst of any sample. seconds: the median of a call."""

    name: str
    config: SparseContextConfig
    kept: int
    total: int
    scores: Mapping[str, float | None]
    seconds: float
    holds: bool

    def score_text(self) -> str:
        """The scores, in words."""
        texts = [
            f"{name.removesuffix('_to_dense')} {score:.3g}" for name, score in self.scores.items() if score is not None
        ]
        return ", ".join(texts)


@dataclass(frozen=True)
class Way:
    """One way to choose tokens: what was tried, most tokens first."""

    task: str
    overview: int | str | None
    tried: Sequence[Tried]

    @property
    def best(self) -> Tried | None:
        """The fewest tokens within the tolerance, where fewer had to show; None where no keep is."""
        return next((each for each in reversed(self.tried) if each.holds), None)


@dataclass(frozen=True)
class Won:
    """What is won: seconds of one call, and bytes that it takes on top of the weights where that can be told, each with
    all tokens and with the recommended ones."""

    seconds: tuple[float, float]
    memory: tuple[int, int] | None

    def __str__(self) -> str:
        dense, sparse = self.seconds
        text = f"{dense / sparse:.2f}x as fast: {sparse:.2f} s instead of {dense:.2f} s"
        if self.memory is not None:
            all_tokens, kept = (each / 2**20 for each in self.memory)
            text += f"; {kept:.0f} MiB of memory on top of the weights instead of {all_tokens:.0f} MiB"
        return text


@dataclass(frozen=True)
class Recommendation:
    """What was found. best: what is recommended; None: all tokens. won: what that wins over all tokens."""

    ways: Sequence[Way]
    best: Tried | None
    won: Won | None

    def to_dict(self) -> dict[str, Any]:
        """Everything that was tried, and what is recommended, for JSON."""
        ways = [
            {
                "task": way.task,
                "overview": way.overview,
                "best": way.best and way.best.name,
                "tried": [
                    {
                        "name": each.name,
                        "keep": each.config.keep,
                        "kept": each.kept,
                        "total": each.total,
                        "scores": dict(each.scores),
                        "seconds": each.seconds,
                        "within": each.holds,
                    }
                    for each in way.tried
                ],
            }
            for way in self.ways
        ]
        return {"best": self.best and self.best.name, "won": self.won and asdict(self.won), "ways": ways}

    def __str__(self) -> str:
        lines = [f"{'task':<10}{'overview':<12}{'smallest keep':<15}{'tokens':<16}scores of the worst scene"]
        for way in self.ways:
            best = way.best
            line = f"{way.task:<10}{name_overview(way.overview):<12}"
            if best is None:
                lines.append(
                    f"{line}{'none':<15}{'':<16}{way.tried[0].score_text()} at keep {way.tried[0].config.keep:g}"
                )
                continue
            lines.append(f"{line}{best.config.keep:<15g}{f'{best.kept} of {best.total}':<16}{best.score_text()}")
        if self.best is None:
            return "\n".join([*lines, "recommended: keep all tokens; with fewer, the images are outside the tolerance"])
        config = self.best.config
        overview = f", overview {name_overview(config.overview)}" if config.overview is not None else ""
        return "\n".join([*lines, f"recommended: keep {config.keep:g}, task {config.task}{overview}", str(self.won)])


def name_overview(overview: object) -> str:
    return "none" if overview is None else f"by {overview}" if isinstance(overview, int) else str(overview)


def draw_sheet(found: Recommendation, samples: Sequence[Sample], folder: Path) -> Image.Image:
    """The sheet of a search in `folder`: of the first samples the picture with all tokens; and of each way its tokens,
    its best picture, and the first one that is not within the tolerance."""
    blocks = []
    for sample in samples[:SHOWN_SAMPLES]:
        rows = [label(_picture(folder / DENSE / f"{sample.name}.png"), "all tokens")]
        for way in found.ways:
            first = way.tried.index(way.best) if way.best else 0
            shown = way.tried[first : first + 2]
            parts = [_picture(folder / "shown" / shown[0].name / "tokens" / f"{sample.name}.png")]
            for each in shown:
                picture = _picture(folder / "shown" / each.name / f"{sample.name}.png")
                parts.append(label(picture, f"keep {each.config.keep:g}: {'within' if each.holds else 'outside'}"))
            chosen = "recommended: " if found.best is not None and way.best is found.best else ""
            rows.append(label(side_by_side(parts), f"{chosen}task {way.task}, overview {name_overview(way.overview)}"))
        blocks.append(label(column(rows), sample.prompt))
    return side_by_side(blocks, gap=24)


def _picture(path: Path) -> Image.Image:
    picture = open_picture(path).convert("RGB")
    return picture.resize((max(1, round(picture.width * SIDE / picture.height)), SIDE), Image.Resampling.LANCZOS)
