"""What the server holds of each open page: its pictures, what is painted on them, and the work that it has begun.

All of it is in memory, and forgotten when the page is closed.
"""

import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from PIL import Image

from ..pipelines.engine import Generation
from ..pipelines.errors import Cancelled
from ..pipelines.steps import PATIENCE, Progress

MOST_SESSIONS = 32
MOST_DENSE = 4  # pictures with all tokens that a page may come back to

Result = TypeVar("Result")


@dataclass(eq=False)
class Loaded:
    """A picture that a page has loaded.

    painted: as in `scene.Reference`. mask_file: the same as an address that holds it, so that it is packed once.
    """

    name: str
    picture: Image.Image
    painted: np.ndarray | None = None
    mask_file: str = ""


@dataclass(eq=False)
class Session:
    """What is held of one page.

    painting: the picture that its brush is for. dense: pictures with all tokens, by what they depend on beside the
    references. memory: the least that a call of each kind took, in bytes; None where it cannot be told. drawn: what the
    overlays were drawn of last, and what came of it; `drawing` is held meanwhile.
    """

    pictures: list[Loaded] = field(default_factory=list)
    painting: Loaded | None = None
    dense: OrderedDict[tuple, Generation] = field(default_factory=OrderedDict)
    memory: dict[tuple, int | None] = field(default_factory=dict)
    cancel: threading.Event = field(default_factory=threading.Event)
    drawn: tuple[object, list] | None = None
    drawing: threading.Lock = field(default_factory=threading.Lock)

    def show(self, pictures: Sequence[Loaded]) -> None:
        """Take other pictures in place of those that are there. Nothing is remembered of what was made of those."""
        self.pictures = list(pictures)
        self.dense = OrderedDict()
        if self.painting not in self.pictures:
            self.painting = None

    def begin(self) -> threading.Event:
        """End what the page had begun before, and return what ends what it begins now."""
        self.cancel.set()
        self.cancel = threading.Event()
        return self.cancel


def remember(dense: OrderedDict[tuple, Generation], key: tuple, generation: Generation) -> None:
    """Hold a picture with all tokens in `Session.dense`, and forget the one that was used longest ago."""
    dense[key] = generation
    dense.move_to_end(key)
    while len(dense) > MOST_DENSE:
        dense.popitem(last=False)


class Sessions:
    """The sessions, by what Gradio calls a page. The page that was used longest ago goes first where there are many."""

    def __init__(self) -> None:
        self._open: OrderedDict[str, Session] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._open)

    def of(self, page: str | None) -> Session:
        """The session of a page. Raises ValueError for a page that was forgotten: its connection may have been lost, or
        the app begun anew, and what it shows is not here any more."""
        with self._lock:
            if str(page) not in self._open:
                raise ValueError("The app no longer holds the images of this page: reload the page.")
            self._open.move_to_end(str(page))
            return self._open[str(page)]

    def start(self, page: str | None) -> Session:
        """The session of a page that was loaded, or that brings pictures: a new one for a page that is new."""
        with self._lock:
            session = self._open.setdefault(str(page), Session())
            self._open.move_to_end(str(page))
            while len(self._open) > MOST_SESSIONS:
                self._open.popitem(last=False)[1].cancel.set()
            return session

    def close_all(self) -> None:
        """Forget all pages."""
        for page in list(self._open):
            self.close(page)

    def close(self, page: str | None) -> None:
        """Forget a page, and end what it has begun within a step."""
        with self._lock:
            session = self._open.pop(str(page), None)
        if session is not None:
            session.cancel.set()


_worker = ThreadPoolExecutor(1, "sparse-context")  # one thread for all, so that memory is that of the calls alone


def stepwise(work: Callable[[Progress], Result], cancel: threading.Event) -> Iterator[tuple[int, int] | Result]:
    """Run `work(progress)` in the thread for models: yields (step, steps) as it goes on, and its result at the end.

    Whoever stops listening sets `cancel`, and waits until the work has ended. Raises what `work` raises, and Cancelled
    where `cancel` is set before its turn.
    """
    told: queue.Queue = queue.Queue()

    def run() -> Result:
        return work(lambda step, steps: told.put((step, steps)))

    running = _worker.submit(run)
    running.add_done_callback(lambda _: told.put(None))
    try:
        while True:
            try:
                step = told.get(timeout=PATIENCE)
            except queue.Empty:
                if cancel.is_set() and running.cancel():
                    raise Cancelled("The call was cancelled.") from None
                continue
            if step is None:
                yield running.result()
                return
            yield step
    finally:
        if not running.done():
            cancel.set()
            wait([running])
