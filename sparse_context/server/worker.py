"""The thread that makes things with one engine, one after the other, and the bounded queue before it."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from PIL import Image

from ..families import family_of
from ..pipelines.engine import WARM_UP_STEPS, Engine, Generation
from ..pipelines.errors import Cancelled, GenerationError
from ..pipelines.spec import Request
from ..pipelines.steps import Draw, Preview
from .errors import ApiError, from_exception, internal, not_loaded, stopping, too_busy
from .jobs import Done, Failed, Job, Made
from .metrics import Metrics
from .schema import SUBJECTS
from .settings import Settings

TRIALS = (1, 2, 4)
"""Pictures of a call that are tried at the start. A larger call has to be faster by `WORTH` a picture than a smaller
one: those in it wait for each other."""
WORTH = 0.05

log = logging.getLogger("sparse_context.server")


class Worker:
    """Loads the engine's pipeline in its own thread, then serves jobs in the order in which they came.

    Jobs that differ in prompt and seeds alone are served by one call, as long as that holds no more than `batch`
    pictures. on_failure: called where the pipeline does not load; `failure` is then what was raised. None: that is
    logged, and clients are told. threads: how many calls are made at a time, where those that make them allow more than
    one (on_ray.py).
    """

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        metrics: Metrics,
        on_failure: Callable[[], None] | None = None,
        threads: int = 1,
    ) -> None:
        self.engine = engine
        self.settings = settings
        self.metrics = metrics
        self.on_failure = on_failure
        self.batch = 1
        self.ready = False
        self.failure: Exception | None = None
        self._pace = 1.0  # seconds a picture, of late
        self._stopping = False
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._known: list[Job] = []  # those that wait or run, and those that a retry may ask for
        self._changed = threading.Condition()
        self._threads = [threading.Thread(target=self._run, name="sparse-context worker", daemon=True)]
        self._threads += [threading.Thread(target=self._work, daemon=True) for _ in range(threads - 1)]

    @property
    def is_stopping(self) -> bool:
        return self._stopping

    # What the event loop calls --------------------------------------------------------------------------------------

    def start(self) -> None:
        self._threads[0].start()

    def stop(self, seconds: float = 10.0) -> None:
        """Cancel what is left, and wait so long for the thread to end."""
        with self._changed:
            self._stopping = True
            for job in [*self._waiting, *self._running]:
                job.cancel("shutdown")
                job.tell(Failed(stopping() if self.failure is None else not_loaded()))
            for job in self._waiting:
                job.close()
            self._waiting.clear()
            self._changed.notify_all()
        for thread in self._threads:
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(seconds)

    def check(self, request: Request) -> None:
        """Raise ValueError for a request that the pipeline does not take, as far as that is known before its turn."""
        if self.ready:
            self.engine.check(request)

    def check_room(self) -> None:
        """Raise `ApiError` where a job would be refused: before its body is read."""
        with self._changed:
            self._check_room()

    def submit(self, job: Job, join: bool) -> Job:
        """Queue a job, and return it; or where the same one is there and may be joined, that one: the oldest, and
        before all others one whose client has left, for it is the client's own.

        The worker closes the job that it returns. Raises `ApiError` for a full queue.
        """
        with self._changed:
            same = [each for each in self._known if each.key == job.key and each.cancelled is None]
            if join and same:
                self.metrics.joined.inc()
                return min(same, key=lambda each: not each.is_alone)
            self._check_room()
            self._waiting.append(job)
            self._known.append(job)
            self.metrics.waiting.set(len(self._waiting))
            self._changed.notify_all()
        return job

    def drop(self, job: Job, reason: str) -> None:
        """Cancel a job that nobody waits for, unless somebody does by now; forget it if it is done."""
        with self._changed:
            if not job.is_alone:
                return
            if job in self._known:
                self._known.remove(job)
            if not job.ended and job.cancelled is None:
                job.cancel(reason)
                self.metrics.cancelled.labels(reason).inc()
            if job in self._waiting:
                self._waiting.remove(job)
                self.metrics.waiting.set(len(self._waiting))
                job.close()

    def _check_room(self) -> None:
        if self.failure is not None:
            raise not_loaded()
        if self._stopping:
            raise stopping()
        if len(self._waiting) >= self.settings.queue:
            self.metrics.refused.inc()
            raise too_busy(self._pace * sum(len(job.seeds) for job in self._waiting) / 2 / len(self._threads))

    # What the thread does -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._load()
        except Exception as error:
            with self._changed:
                self.failure = error
            self.stop()
            if self.on_failure is not None:
                return self.on_failure()
            return log.error("the model does not load: %s", error)
        for thread in self._threads[1:]:
            thread.start()
        self._work()

    def _work(self) -> None:
        while jobs := self._next():
            try:
                self._serve(jobs)
            except Exception:
                log.exception("a job failed")
                self._fail(jobs, internal())
            finally:
                self._finish(jobs)

    def _load(self) -> None:
        self.engine.warm_up()
        self.engine.load()
        self.batch = self._find_batch()
        self.ready = True
        log.info("ready, making at most %s a call", "1 picture" if self.batch == 1 else f"{self.batch} pictures")

    def _find_batch(self) -> int:
        """As many pictures of a call as the operator says, or as are fastest; 1 where the pipeline takes no more."""
        if not family_of(self.engine.pipe()).batch:
            return 1
        if self.settings.batch is not None:
            return self.settings.batch
        best, fastest = 1, float("inf")
        grey = Request("grey", [Image.new("RGB", (512, 512), "grey")], self.settings.config, steps=WARM_UP_STEPS)
        for pictures in TRIALS:
            start = time.perf_counter()
            try:
                self.engine.together([replace(grey, seed=seed) for seed in range(pictures)])
            except (GenerationError, ValueError):  # most likely the memory, or defaults for other references
                break
            seconds = (time.perf_counter() - start) / pictures
            self.metrics.trial.labels(str(pictures)).set(seconds)
            if seconds < fastest * (1 - WORTH):
                best, fastest = pictures, seconds
        return best

    def _next(self) -> list[Job]:
        """The next job, and others that can be served with it; none once the worker is stopped."""
        with self._changed:
            while not self._waiting and not self._stopping:
                self._changed.wait()
            if self._stopping:
                return []
            first = self._waiting.popleft()
            jobs, pictures = [first], len(first.seeds)
            for job in [*self._waiting]:
                if job.alike == first.alike and pictures + len(job.seeds) <= self.batch:
                    self._waiting.remove(job)
                    jobs.append(job)
                    pictures += len(job.seeds)
            self._running += jobs
            self.metrics.waiting.set(len(self._waiting))
            self.metrics.running.set(len(self._running))
        return jobs

    def _serve(self, jobs: Sequence[Job]) -> None:
        """Make what these jobs want, by as few calls as the batch allows. Whatever goes wrong is told to the jobs."""
        start = time.monotonic()
        for job in jobs:
            self.metrics.queue_seconds.observe(start - job.submitted)
        try:
            request = jobs[0].read()
            self.metrics.phase_seconds.labels("open").observe(time.monotonic() - start)
            wanted = [(job, seed) for job in jobs for seed in job.seeds]
            made: dict[Job, list[Made]] = {job: [] for job in jobs}
            for first in range(0, len(wanted), self.batch):
                self._call(request, wanted[first : first + self.batch], made)
            for job, pictures in made.items():
                if len(pictures) == len(job.seeds):
                    job.tell(self._done(request, job, pictures, start))
        except Cancelled:
            return
        except Exception as error:
            if len(jobs) > 1:  # one of them may have spoilt it
                for job in jobs:
                    if not job.ended:
                        self._serve([job])
                return
            known = from_exception(error, SUBJECTS)
            if known is None:
                log.exception("a job failed")
            self._fail(jobs, known or internal())

    def _call(self, request: Request, wanted: Sequence[tuple[Job, int]], made: dict[Job, list[Made]]) -> None:
        """One call of the engine, for those of these pictures that are still wanted; or one for each, where the engine
        fails at all of them together, of which there may be too many for the memory."""
        wanted = [pair for pair in wanted if not _is_gone(pair)]
        if not wanted:
            return

        def preview(step: int, steps: int, draw: Draw) -> None:
            telling = [i for i, (job, _) in enumerate(wanted) if job.wants_partial(step, steps)]
            pictures = draw() if telling else []
            for i in telling:
                wanted[i][0].tell_partial(pictures[i])

        start, generations = time.perf_counter(), None
        try:
            generations = self._make(
                [replace(request, prompt=job.prompt, seed=seed) for job, seed in wanted],
                [job.partials for job, _ in wanted],
                lambda: all(map(_is_gone, wanted)),
                preview,
            )
        except GenerationError:
            if len(wanted) == 1:
                raise
        if generations is None:  # here, where the error holds none of the memory of the call that failed any more
            for pair in wanted:
                self._call(request, [pair], made)
            return
        self._pace += 0.3 * ((time.perf_counter() - start) / len(wanted) - self._pace)
        self.metrics.count_call(generations, len({id(job) for job, _ in wanted}))
        for (job, seed), generation in zip(wanted, generations, strict=True):
            made[job].append(Made(generation, seed, len(wanted)))

    def _make(
        self, requests: Sequence[Request], partials: Sequence[int], cancel: Callable[[], bool], preview: Preview
    ) -> list[Generation]:
        """Answer requests by one call. partials: how many pictures on the way each one wants of `preview`."""
        return self.engine.together(requests, cancel=cancel, preview=preview if any(partials) else None)

    def _done(self, request: Request, job: Job, made: Sequence[Made], start: float) -> Done:
        return Done(tuple(made), start - job.submitted, *self._count(request, job.prompt, made[0].generation))

    def _count(self, request: Request, prompt: str, generation: Generation) -> tuple[int, int]:
        """Tokens of a prompt and of a picture that was made of it."""
        return count_tokens(self.engine.pipe(request.config), prompt, generation)

    def _fail(self, jobs: Sequence[Job], error: ApiError) -> None:
        for job in jobs:
            if not job.ended:
                self.metrics.failed.inc()
                job.tell(Failed(error))

    def _finish(self, jobs: Sequence[Job]) -> None:
        """Forget jobs, but those whose client left and may ask again."""
        with self._changed:
            self._running = [job for job in self._running if job not in jobs]
            self.metrics.running.set(len(self._running))
            for job in jobs:
                job.close()
                if job in self._known and not (job.is_alone and job.ended and job.cancelled is None):
                    self._known.remove(job)


def _is_gone(pair: tuple[Job, int]) -> bool:
    return pair[0].cancelled is not None


def count_tokens(pipe: Any, prompt: str, generation: Generation) -> tuple[int, int]:
    """Tokens of a prompt (0 where the pipeline does not tell) and of a picture that was made of it."""
    tokenizer, token = getattr(pipe, "tokenizer", None), 2 * pipe.vae_scale_factor
    text = 0 if tokenizer is None else len(tokenizer(prompt)["input_ids"])
    return text, (generation.image.width // token) * (generation.image.height // token)
