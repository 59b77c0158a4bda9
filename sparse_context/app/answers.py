"""What a page begins: one picture, dense beside sparse; and a sweep over what is kept."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..pipelines.engine import WARM_UP_STEPS, Engine, Generation, all_tokens
from ..pipelines.errors import Cancelled
from ..pipelines.spec import Request
from . import drawing
from .scene import Scene
from .sessions import Session, remember, stepwise

MOST_CELLS = 64
"""Of a sweep."""

STOPPED = "Stopped."


@dataclass(frozen=True)
class Answer:
    """What is to be shown, as HTML; None leaves what is there."""

    status: str = ""
    result: str | None = None
    figures: str | None = None


def answer(engine: Engine, scene: Scene, session: Session, compare: bool) -> Iterator[Answer]:
    """The picture of a scene, and, to compare, the one with all tokens, which is made once for the same scene.

    Where times are compared, the first call of a kind has a short one before it, for it pays for more than itself.
    Raises ValueError for what the model does not take, and GenerationError.
    """
    request = scene.request()
    cancel, held = session.begin(), session.dense
    dense_request, key = all_tokens(request), dense_key(scene, request)
    dense = held.get(key)
    compare = compare and bool(request.references)
    try:
        for each in [request, dense_request][: 2 if dense is None else 1] if compare else []:
            yield from _warm_up(engine, each, session)
        sparse = yield from _told(engine, request, cancel, "kept tokens")
        if dense is None or not compare:
            yield Answer("", drawing.picture(sparse, scene.prompt), drawing.figures(sparse, None))
        if not compare:
            return
        if dense is None:
            dense = yield from _told(engine, dense_request, cancel, "all tokens")
        remember(held, key, dense)
        yield Answer("", drawing.comparison(dense, sparse), drawing.figures(sparse, dense))
    except Cancelled:
        yield Answer(STOPPED)
    except Exception:
        yield Answer("")  # so that no bar is left
        raise


def _warm_up(engine: Engine, request: Request, session: Session) -> Iterator[Answer]:
    """A short call before the first one of this kind: of this model, and as many tokens."""
    kind = engine.spec, engine.select(request).kept, request.height, request.width
    if kind in session.warm:
        return
    yield Answer(drawing.progress(0, 1, "Warming up, so that times can be compared ..."))
    for _ in _step(engine, replace(request, steps=WARM_UP_STEPS), session.cancel):
        pass
    session.warm.add(kind)


def _told(engine: Engine, request: Request, cancel: Any, what: str) -> Iterator[Answer]:
    """The steps of a call; returns what it makes."""
    yield Answer(drawing.progress(0, 1, f"With {what} ..."))
    for told in _step(engine, request, cancel):
        if isinstance(told, Generation):
            return told
        step, steps = told
        yield Answer(drawing.progress(step, steps, f"With {what}: step {step} of {steps}"))
    raise AssertionError("a call ends with what it made")


def _step(engine: Engine, request: Request, cancel: Any) -> Iterator[tuple[int, int] | Generation]:
    return stepwise(lambda progress: engine(request, cancel=cancel, progress=progress, memory=True), cancel)


def dense_key(scene: Scene, request: Request) -> tuple:
    """What the picture with all tokens depends on, beside its references."""
    return scene.spec, scene.prompt, tuple(sorted(scene.call.items())), str(request.config.task)


def sweep(
    engine: Engine, scene: Scene, session: Session, keeps: Sequence[float | str], selectors: Sequence[Any]
) -> Iterator[Answer]:
    """A grid of the scene's picture over keeps and selectors, which all references then have, and all tokens first.

    selectors: by name, or None: the task decides. Raises ValueError for too many pictures, and what a call raises.
    """
    if not keeps or not selectors:
        raise ValueError("The sweep is empty: write at least one keep, and choose a selector.")
    if len(keeps) * len(selectors) > MOST_CELLS:
        raise ValueError(f"The sweep has {len(keeps) * len(selectors)} pictures: ask for {MOST_CELLS} at most.")
    if not scene.references:
        raise ValueError("There are no references, of which a sweep keeps more or less: add a picture first.")
    asked = [[_setting(scene, keep, selector).request() for keep in keeps] for selector in selectors]
    cancel, held = session.begin(), session.dense
    columns = [f"keep {keep}" for keep in keeps]
    rows = ["by task" if selector is None else str(selector) for selector in selectors]
    cells: list[list[str | None]] = [[None] * len(keeps) for _ in selectors]
    count, made = 1 + len(keeps) * len(selectors), 0

    def shown() -> str:
        return drawing.grid(columns, rows, cells)

    def run(request: Request, what: str) -> Iterator[Answer]:
        yield Answer(drawing.progress(made, count, f"Picture {made + 1} of {count}, {what}"))
        for told in _step(engine, request, cancel):
            if isinstance(told, Generation):
                return told
            done, text = made + told[0] / told[1], f"Picture {made + 1} of {count}, {what}: step {told[0]} of {told[1]}"
            yield Answer(drawing.progress(done, count, text))

    try:
        dense_request = all_tokens(scene.request())
        key = dense_key(scene, dense_request)
        dense = held.get(key) or (yield from run(dense_request, "all tokens"))
        remember(held, key, dense)
        made += 1
        base = drawing.base(dense)
        for i, line in enumerate(asked):
            for j, request in enumerate(line):
                what = f"{columns[j]}, {rows[i]}"
                made_picture = yield from run(request, what)
                cells[i][j] = drawing.cell(made_picture, dense, what)
                made += 1
                yield Answer(drawing.progress(made, count, f"{made} of {count} pictures"), base + shown())
        yield Answer(f"{count} pictures.")
    except Cancelled:
        yield Answer(f"{STOPPED} {made} of {count} pictures were made.")
    except Exception:
        yield Answer("")
        raise


def _setting(scene: Scene, keep: float | str, selector: Any) -> Scene:
    """The scene with one budget for all references, and one selector; what is painted stays."""
    return replace(scene, keep=keep, references=[replace(each, selector=selector) for each in scene.references])
