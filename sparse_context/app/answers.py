"""What a page begins: one picture, dense beside sparse; and a sweep over what is kept."""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..pipelines.engine import WARM_UP_STEPS, Engine, Generation, all_tokens
from ..pipelines.errors import Cancelled
from ..pipelines.spec import Request
from ..selection import Score, score_tokens
from ..selectors.registry import reads_phrases
from . import drawing
from .scene import Scene
from .sessions import Session, remember, stepwise

MOST_CELLS = 64
"""Of a sweep."""

STOPPED = "Stopped."


@dataclass(frozen=True)
class Answer:
    """What is to be shown, as HTML; None leaves what is there. is_step: it says no more than how far the work is."""

    status: str = ""
    result: str | None = None
    figures: str | None = None
    is_step: bool = False


Answers = Iterator[Answer]


class Work:
    """Calls of an engine for a page, which say how far they are, and end when the page has begun something else."""

    def __init__(self, engine: Engine, session: Session, score: Score = score_tokens) -> None:
        """score: as `select_tokens` takes it."""
        self.engine, self.score = engine, score
        self.memory, self.dense = session.memory, session.dense
        self._cancel = session.begin()

    def call(self, request: Request, what: str, done: int = 0, of: int = 1) -> Generator[Answer, None, Generation]:
        """Make a picture: number `done` of `of`, counted from 0, of which `what` says what it is. Raises what a call
        raises."""
        kind = self._kind(request)

        def told(step: int, steps: int) -> Answer:
            text = f"{what}: step {step} of {steps}" if step else f"{what} ..."
            return Answer(drawing.progress(done + step / steps, of, text), is_step=True)

        yield told(0, 1)
        made = None
        for made in stepwise(self._answer(request), self._cancel):
            if not isinstance(made, Generation):
                yield told(*made)
        assert isinstance(made, Generation)  # which comes last
        peaks = [peak for peak in (made.memory, self.memory.get(kind)) if peak is not None]
        least = min(peaks, default=None)  # what a first call allocates for good is not what a call takes
        self.memory[kind] = least
        return replace(made, memory=least)

    def warm_up(self, request: Request) -> Answers:
        """A short call, where there was none of this kind before: of this model, and as many tokens."""
        if self._kind(request) not in self.memory:
            yield from self.call(replace(request, steps=WARM_UP_STEPS), "Warming up, so that the times are comparable")

    def _kind(self, request: Request) -> tuple:
        kept = self.engine.select(request, self.score).kept if request.references else 0
        return self.engine.spec, kept, request.config.names_overview, request.height, request.width

    def _answer(self, request: Request) -> Any:
        return lambda progress: self.engine(request, cancel=self._cancel, progress=progress, memory=True)


def answer(engine: Engine, scene: Scene, session: Session, compare: bool, score: Score = score_tokens) -> Answers:
    """The picture of a scene, and, to compare, the one with all tokens, which is made once for the same scene.

    Where they are compared, the first call of a kind has a short one before it, for it pays for more than itself.
    Raises ValueError for what the model does not take, and GenerationError.
    """
    request = scene.request()
    work, dense_request, key = Work(engine, session, score), all_tokens(request), dense_key(scene, request)
    dense = work.dense.get(key)
    compare = compare and bool(request.references)
    try:
        if compare:
            yield from work.warm_up(request)
        if compare and dense is None:
            yield from work.warm_up(dense_request)
        sparse = yield from work.call(request, "With the kept tokens" if request.references else "Without references")
        if dense is None or not compare:
            yield Answer("", drawing.picture(sparse, scene.prompt), drawing.figures(sparse, None))
        if not compare:
            return
        dense = dense or (yield from work.call(dense_request, "With all tokens"))
        remember(work.dense, key, dense)
        yield Answer("", drawing.comparison(dense, sparse), drawing.figures(sparse, dense))
    except Cancelled:
        yield Answer(STOPPED)
    except Exception:
        yield Answer()  # so that no bar is left
        raise


def dense_key(scene: Scene, request: Request) -> tuple:
    """What the picture with all tokens depends on, beside its references."""
    return scene.spec, scene.prompt, tuple(sorted(scene.call.items())), str(request.config.task)


def sweep(
    engine: Engine,
    scene: Scene,
    session: Session,
    keeps: Sequence[float | str],
    selectors: Sequence[Any],
    score: Score = score_tokens,
) -> Answers:
    """A grid of the scene's picture over keeps and selectors, which all references then have, and all tokens first.

    selectors: by name or as blends; None: the task decides. Raises ValueError for none or too many pictures, and what
    a call raises.
    """
    pictures = len(keeps) * len(selectors)
    if not pictures:
        raise ValueError("The sweep is empty: enter at least one keep and choose a selector.")
    if pictures > MOST_CELLS:
        raise ValueError(f"The sweep has {pictures} images: ask for {MOST_CELLS} at most.")
    if not scene.references:
        raise ValueError("A sweep varies what is kept of references, and there are none: add an image first.")
    requests = [[_setting(scene, keep, selector).request() for keep in keeps] for selector in selectors]
    columns = [f"keep {keep}" for keep in keeps]
    rows = ["auto" if selector is None else str(selector) for selector in selectors]
    cells: list[list[str | None]] = [[None] * len(keeps) for _ in selectors]
    dense_request = all_tokens(scene.request())
    work, key = Work(engine, session, score), dense_key(scene, dense_request)
    made, count = 0, pictures + 1
    try:
        dense = work.dense.get(key) or (
            yield from work.call(dense_request, f"Image 1 of {count}, all tokens", 0, count)
        )
        remember(work.dense, key, dense)
        made = 1
        yield Answer(drawing.progress(made, count, ""), drawing.base(dense) + drawing.grid(columns, rows, cells))
        for i, line in enumerate(requests):
            for j, request in enumerate(line):
                setting = f"{columns[j]}, {rows[i]}"
                one = yield from work.call(request, f"Image {made + 1} of {count}, {setting}", made, count)
                cells[i][j] = drawing.cell(one, dense, setting)
                made += 1
                shown = drawing.base(dense) + drawing.grid(columns, rows, cells)
                yield Answer(drawing.progress(made, count, f"{made} of {count} images"), shown)
        yield Answer(f"{count} images.")
    except Cancelled:
        yield Answer(f"{STOPPED} {made} of {count} images were made.")
    except Exception:
        yield Answer()
        raise


def _setting(scene: Scene, keep: float | str, selector: Any) -> Scene:
    """The scene with one budget for all references, and one selector; what is painted stays, and phrases where the
    selector reads them."""
    reads = reads_phrases(selector)
    references = [replace(each, selector=selector, phrase=each.phrase if reads else "") for each in scene.references]
    return replace(scene, keep=keep, references=references)
