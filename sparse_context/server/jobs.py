"""One thing to make, and all who wait for it."""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image

from ..pipelines.engine import Generation
from ..pipelines.spec import Request
from .errors import ApiError


@dataclass(frozen=True)
class Partial:
    """A picture as far as it has come. index: how many were told before it."""

    index: int
    image: Image.Image


@dataclass(frozen=True)
class Made:
    """One picture: its seed, and how many were made by the same call."""

    generation: Generation
    seed: int
    together: int


@dataclass(frozen=True)
class Done:
    """All pictures of a job. Token counts are of the prompt, and of one picture."""

    made: tuple[Made, ...]
    queue_seconds: float
    text_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Failed:
    """Why there are none."""

    error: ApiError


Event = Partial | Done | Failed


class Job:
    """Pictures of one prompt, one for each seed.

    read: reads the pictures that were sent, and makes the request of them, with the first seed. It is called in the
    worker's thread, and raises what `Request` and `open_picture` raise. close: called once when it will not be opened
    any more.
    key: equal for the same request sent again. alike: equal for requests that differ in prompt and seeds alone.
    partials: how many pictures on the way are wanted.
    Threads may call all methods, and listeners may come at any time: what was told before is told to them too.
    """

    def __init__(
        self,
        read: Callable[[], Request],
        prompt: str,
        seeds: Sequence[int],
        key: str,
        alike: str,
        partials: int = 0,
        close: Callable[[], None] = lambda: None,
    ) -> None:
        self.read = read
        self.close = close
        self.prompt = prompt
        self.seeds = tuple(seeds)
        self.key = key
        self.alike = alike
        self.partials = partials
        self.submitted = time.monotonic()
        self.cancelled: str | None = None  # the reason
        self._events: list[Event] = []
        self._listeners: list[Listener] = []
        self._lock = threading.Lock()

    @property
    def ended(self) -> bool:
        """Whether all was told."""
        return bool(self._events) and isinstance(self._events[-1], (Done, Failed))

    @property
    def is_alone(self) -> bool:
        """Whether nobody waits for it."""
        return not self._listeners

    def wants_partial(self, step: int, steps: int) -> bool:
        """Whether a picture is to be told after this step: they are spread evenly, and the last step has the answer."""
        return wants_partial(self.partials, step, steps)

    def cancel(self, reason: str) -> None:
        """Nobody wants it any more. What is under way stops before its next step."""
        self.cancelled = self.cancelled or reason

    def tell(self, event: Event) -> None:
        """Tell all who listen. What comes after the end is not told."""
        with self._lock:
            if not self.ended:
                self._events.append(event)
                for listener in self._listeners:
                    listener.put(event)

    def tell_partial(self, image: Image.Image) -> None:
        """Tell a picture on the way. One too many is not told: its call was made again from the start."""
        index = sum(isinstance(event, Partial) for event in self._events)
        if index < self.partials:
            self.tell(Partial(index, image))

    def listen(self) -> "Listener":
        """Wait for it, from an event loop, until `leave`."""
        listener = Listener(asyncio.get_running_loop())
        with self._lock:
            for event in self._events:
                listener.put(event)
            self._listeners.append(listener)
        return listener

    def leave(self, listener: "Listener") -> None:
        with self._lock:
            if listener in self._listeners:
                self._listeners.remove(listener)


def wants_partial(partials: int, step: int, steps: int) -> bool:
    """Whether one of so many pictures on the way is that after this step."""
    if step >= steps:
        return False
    reached, before = (done * (partials + 1) // steps for done in (step, step - 1))
    return reached > before


class Listener:
    """One who waits for a job in an event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    def put(self, event: Event) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def next(self) -> Event:
        """The next event. After `Done` or `Failed` there is none."""
        return await self._events.get()

    async def end(self) -> Done:
        """The pictures. Raises `ApiError` where there are none."""
        while True:
            event = await self.next()
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Done):
                return event
