"""What happens on the page when its controls are used."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ..cache import ReferenceCache
from ..embedded.demo import KEEP as KEEP_OF_TASK
from ..embedded.demo import read_examples
from ..pipelines.engine import Engine
from ..pipelines.spec import ModelSpec, Request
from ..texts import read_keep, read_selector
from . import answers, copies, drawing
from .controls import OWN, SLOTS, WIDTH, Controls
from .layout import Layout
from .references import apart, from_canvas, load_files, to_canvas
from .scene import Scene
from .sessions import Loaded, Session, Sessions
from .words import in_words, sentence, warn

WAITING = 16  # pages at most whose pictures are made, one after the other
LEFT_FOR = (60, 600)  # seconds: how often files of the painter are looked for to be deleted, and how old they are then
PACE = 0.2  # seconds between two steps that are shown
SCORES = 64 * 2**20  # bytes of scores that are remembered, so that a dial that moves is answered at once
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
"""Of every event: the page is no API, and shows in its own way that it works."""


class Page:
    """The page, the models that may be chosen on it, and the sessions of those who have it open."""

    def __init__(self, specs: Mapping[str, ModelSpec], start: Request) -> None:
        """specs: by the names on the page. start: what the controls say at first; it has no references."""
        self.specs, self.start = specs, start
        self.engines = {name: Engine(spec, bar=False) for name, spec in specs.items()}
        self.sessions = Sessions()
        self.cache = ReferenceCache(SCORES)
        self.examples = read_examples()
        self.blocks = self._build()

    def _build(self) -> gr.Blocks:
        with gr.Blocks(title="Sparse Context", fill_width=True, delete_cache=LEFT_FOR) as blocks:
            self.controls = Controls(list(self.specs), self.start)
            self._wire(blocks, Layout(self.controls, self.examples))
        return blocks

    def _wire(self, blocks: gr.Blocks, page: Layout) -> None:
        controls, cards = self.controls, [slot.card for slot in self.controls.slots]
        values = [value for slot in controls.slots for value in slot.values]
        drawn = [slot.overlay for slot in controls.slots]
        shown = [page.summary, *drawn, page.python, page.command, page.settings]
        # Beside the queue, which would answer a tenth of a second later.
        redraw: dict[str, Any] = {"fn": self.redraw, "inputs": controls.inputs, "outputs": shown, **QUIET}
        redraw["queue"] = False
        gr.on(controls.triggers, **redraw, trigger_mode="always_last")
        pictures = [*cards, *values, page.painter]
        page.files.upload(self.add, [page.files, *values], [page.files, *pictures], **QUIET).then(**redraw)
        page.gallery.select(self.take_example, None, [controls.prompt, *pictures], **QUIET).then(**redraw)
        for i, slot in enumerate(controls.slots):
            slot.remove.click(_of_slot(self.remove, i), values, pictures, **QUIET).then(**redraw)
            slot.paint.click(_of_slot(self.paint, i), None, [page.painter, page.painted, page.editor], **QUIET)
        page.editor.change(self.take_paint, [page.editor], None, trigger_mode="always_last", **QUIET).then(**redraw)
        page.clear.click(self.clear_paint, None, [page.editor], **QUIET).then(**redraw)
        page.done.click(lambda: gr.update(visible=False), None, [page.painter], **QUIET)
        controls.budget.input(
            self.show_budget, [controls.budget], [controls.keep, *(s.keep for s in controls.slots)], **QUIET
        )

        work: dict[str, Any] = {**QUIET, "concurrency_id": "model", "concurrency_limit": WAITING}
        page.generate.click(self.make, [page.compare, *controls.inputs], page.answer, **work)
        page.run_sweep.click(self.sweep, [page.keeps, page.selectors, *controls.inputs], page.swept, **work)
        for button in (page.stop, page.stop_sweep):
            button.click(self.cancel, None, None, queue=False, **QUIET)
        blocks.load(**redraw | {"fn": self.start_page})
        blocks.unload(self.close)

    def _scene(self, request: gr.Request, values: tuple) -> tuple[Session, Scene]:
        session = self.sessions.of(request.session_hash)
        return session, self._known(self.controls.scene(session, self.specs, values), values)

    def _known(self, scene: Scene, values: tuple) -> Scene:
        """The scene, with what the weights that answer it were trained for, where a painted mask is to stand beside
        what they choose by. Raises ValueError for settings that do not fit."""
        config = scene.selection_config()
        if all(each.painted is None for each in scene.references):
            return scene
        return replace(scene, trained=self.engines[values[1]].trained(config))

    def start_page(self, request: gr.Request, *values: Any) -> list[Any]:
        """Hold what a page that was loaded will bring."""
        self.sessions.start(request.session_hash)
        return self.redraw(request, *values)

    def redraw(self, request: gr.Request, *values: Any) -> list[Any]:
        """The kept tokens over each reference, and the scene as text. What does not fit is said above the references,
        which are shown without tokens then."""
        try:
            session = self.sessions.of(request.session_hash)
        except ValueError as error:
            return [drawing.problem(sentence(error)), *[gr.skip()] * (SLOTS + 3)]
        with session.drawing:
            key = values, [(each.name, each.picture, each.mask_file) for each in session.pictures]
            if session.drawn is None or session.drawn[0] != key:  # Gradio tells twice of what is chosen from a list
                session.drawn = key, self._draw(session, values)
            return session.drawn[1]

    def _draw(self, session: Session, values: tuple) -> list[Any]:
        try:
            scene = self.controls.scene(session, self.specs, values)
            scene = self._known(scene, values)  # which says what does not fit, before anything is written of it
            texts = [copies.to_python(scene), copies.to_command(scene), self._files(session, scene)]
            if not scene.references:
                return ["", *[""] * SLOTS, *texts]
            selection = self.engines[values[1]].select(scene.request(), self.cache.score)
        except Exception as error:
            bare = [
                drawing.bare_card(i, Path(each.name).name, each.picture) for i, each in enumerate(session.pictures, 1)
            ]
            return [drawing.problem(sentence(error)), *_filled(bare), *[gr.skip()] * 3]
        cards = [
            drawing.card(i, Path(reference.name).name, kept)
            for i, (reference, kept) in enumerate(zip(scene.references, selection.references, strict=True), 1)
        ]
        return [drawing.summary(selection), *_filled(cards), *texts]

    def _files(self, session: Session, scene: Scene) -> str:
        """Links to the settings, and to the masks that are painted."""
        try:
            settings = drawing.text_uri(copies.to_json(scene))
        except ValueError:  # a selector of a phrase, which no file can hold
            return ""
        files = [("Download settings (JSON)", copies.SETTINGS_FILE, settings)]
        for i, loaded in enumerate(session.pictures, start=1):
            if loaded.mask_file:
                files.append((f"Download mask of image {i} (PNG)", copies.mask_name(loaded.name), loaded.mask_file))
        return drawing.links(files)

    @in_words
    def add(self, request: gr.Request, files: list[str] | None, *values: Any) -> list[Any]:
        """Pictures that were uploaded, after those that are there."""
        session = self.sessions.start(request.session_hash)
        loaded, problems, left = load_files(files or [], SLOTS - len(session.pictures))
        if left:
            problems.append(f"There are more than {SLOTS} references: the last {left} are left out.")
        for problem in problems:
            warn(problem)
        session.show(apart([*session.pictures, *loaded]))
        return [None, *self._pictures(session, [gr.skip()] * len(values))]  # which may have changed meanwhile

    @in_words
    def remove(self, i: int, request: gr.Request, *values: Any) -> list[Any]:
        """Reference `i` goes, and those after it move up."""
        session = self.sessions.of(request.session_hash)
        session.show(session.pictures[:i] + session.pictures[i + 1 :])
        others = (*values[: i * WIDTH], *values[(i + 1) * WIDTH :])
        return self._pictures(session, (*others, *self.controls.fresh(SLOTS - 1)))

    @in_words
    def take_example(self, request: gr.Request, event: gr.SelectData) -> list[Any]:
        """An example's pictures, prompt and tasks in place of what is there."""
        session, example = self.sessions.start(request.session_hash), self.examples[event.index]
        paths = [str(path) for path in example["files"]]
        session.show([Loaded(path, picture) for path, picture in zip(paths, example["references"], strict=True)])
        values = [value for task in example["tasks"] for value in (KEEP_OF_TASK[task], False, task, "auto", "")]
        for i in range(len(paths), SLOTS):
            values += self.controls.fresh(i)
        return [example["prompt"], *self._pictures(session, values)]

    def _pictures(self, session: Session, values: Any) -> list[Any]:
        """Which cards are shown, what their controls say, and the painter, which is closed."""
        cards = [gr.update(visible=i < len(session.pictures)) for i in range(SLOTS)]
        session.painting = None
        return [*cards, *values, gr.update(visible=False)]

    @in_words
    def paint(self, i: int, request: gr.Request) -> list[Any]:
        """Open the painter for reference `i`."""
        session = self.sessions.of(request.session_hash)
        loaded = session.painting = session.pictures[i]
        name = escape(Path(loaded.name).name)
        said = (
            f"<p>Image {i + 1}, <b>{name}</b>: paint what to keep <i class=keep>green</i> and what to drop "
            "<i class=drop>red</i>. Change the colour in the palette beside the image.</p>"
        )
        return [gr.update(visible=True), said, to_canvas(loaded)]

    @in_words
    def take_paint(self, request: gr.Request, value: dict | None) -> None:
        """What was painted becomes the reference's mask."""
        loaded = self.sessions.of(request.session_hash).painting
        if loaded is not None and value and value.get("background") is not None:
            loaded.painted = painted = from_canvas(value, loaded.picture.size)
            loaded.mask_file = "" if painted is None else drawing.data_uri(Image.fromarray(painted))

    @in_words
    def clear_paint(self, request: gr.Request) -> Any:
        """Nothing is painted any more."""
        loaded = self.sessions.of(request.session_hash).painting
        if loaded is None:
            raise ValueError("No image is open for painting: press Paint mask first.")
        loaded.painted, loaded.mask_file = None, ""
        return to_canvas(loaded)

    def show_budget(self, budget: str) -> list[Any]:
        """One keep for all references, or one on each card."""
        return [gr.update(visible=budget != OWN), *[gr.update(visible=budget == OWN)] * SLOTS]

    @in_words
    def make(self, request: gr.Request, compare: bool, *values: Any) -> Iterator[list[Any]]:
        """The picture, dense beside sparse."""
        session, scene = self._scene(request, values)
        for answer in paced(answers.answer(self.engines[values[1]], scene, session, compare, self.cache.score)):
            yield [answer.status, *(gr.skip() if part is None else part for part in (answer.result, answer.figures))]

    @in_words
    def sweep(self, request: gr.Request, keeps: str, selectors: list[str], *values: Any) -> Iterator[list[Any]]:
        """The scene over several keeps and selectors."""
        session, scene = self._scene(request, values)
        ratios = [read_keep(text.strip()) for text in keeps.split(",") if text.strip()]
        chosen = [read_selector(text) for text in selectors]
        for answer in paced(answers.sweep(self.engines[values[1]], scene, session, ratios, chosen, self.cache.score)):
            yield [answer.status, gr.skip() if answer.result is None else answer.result]

    def cancel(self, request: gr.Request) -> None:
        """Stop what the page has begun, within a step."""
        with contextlib.suppress(ValueError):  # of a page that was forgotten, and with it what it had begun
            self.sessions.of(request.session_hash).cancel.set()

    def close(self, request: gr.Request) -> None:
        """Forget the page."""
        self.sessions.close(request.session_hash)


def paced(answered: answers.Answers) -> answers.Answers:
    """Without steps that follow another one too fast for a page to draw them, so that it never lags behind."""
    last = 0.0
    for each in answered:
        now = time.monotonic()
        if each.is_step and now - last < PACE:
            continue
        last = now
        yield each


def _filled(cards: list[str]) -> list[str]:
    """What is drawn on the cards that are shown, and nothing on the others."""
    return cards + [""] * (SLOTS - len(cards))


def _of_slot(handler: Callable, i: int) -> Callable:
    """`handler` for slot `i`. (Gradio finds out what to pass by a function's own signature, which a partial hides.)"""

    def handle(request: gr.Request, *values: Any) -> Any:
        return handler(i, request, *values)

    return handle
