"""Spawned processes, each with a pipeline of its own, which get one job at a time through a pipe of their own.

A process that dies, such as by the system's memory killer, takes nobody with it: the job that it was at is given to
another once, and another process takes its place.
"""

import contextlib
import logging
import multiprocessing
import signal
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait

from ..pipelines.errors import Cancelled, GenerationError
from ..pipelines.hub import one_line
from ..pipelines.spec import ModelSpec
from .folder import Folder, Record
from .jobs import Job
from .queue import Queue

ATTEMPTS = 2
"""How often a job is tried whose worker dies, and how often a model is loaded by workers that die at it."""

PATIENCE = 5.0
"""Seconds that a worker has to end by itself when all is done."""

_context = multiprocessing.get_context("spawn")  # a fork would share the state of torch's threads and of CUDA


class Worker:
    """One process, and the job that it is at. It loads its pipeline when it starts."""

    def __init__(self, number: int, spec: ModelSpec, folder: Folder, threads: int, weights: str | None) -> None:
        self.number = number
        self.job: Job | None = None
        self.is_ready = False
        self.connection, theirs = _context.Pipe()
        self.process = _context.Process(target=_work, args=(theirs, spec, folder, threads, weights), daemon=True)
        with _interrupts_ignored():  # an interrupt is for the parent, which ends its workers itself
            self.process.start()
        theirs.close()

    def give(self, job: Job) -> None:
        self.job = job
        with contextlib.suppress(OSError):  # it is dead, which whoever listens to it is told
            self.connection.send(job)

    def cause_of_death(self) -> str:
        self.process.join(PATIENCE)
        code = self.process.exitcode
        if code is None or code >= 0:
            return f"exit code {code}"
        return f"signal {-code} ({signal.Signals(-code).name})"

    def end(self) -> None:
        """End the process, by itself where it is idle, else at once."""
        if self.is_ready and self.job is None:
            with contextlib.suppress(OSError):
                self.connection.send(None)
            self.process.join(PATIENCE)
        self.connection.close()
        self.process.terminate()
        self.process.join(PATIENCE)
        self.process.kill()
        self.process.join()


class Pool:
    """Workers that make jobs.

    workers: those at work, by number. retries: jobs that were given out again, for their worker had died.
    """

    def __init__(self, specs: Sequence[ModelSpec], folder: Folder, threads: int) -> None:
        """A worker for each of `specs`. threads: of each one."""
        self.retries = 0
        self._specs, self._folder, self._threads = specs, folder, threads
        self.workers: dict[int, Worker] = {}
        self._lost = Counter[str]()  # by the name of a job, how many workers died at it
        self._deaths = 0  # at loading, one after another

    def run(self, jobs: Sequence[Job], weights: str | None = None) -> Iterator[Record]:
        """Make the jobs; yields their records as they come. However it ends, no process is left.

        weights: what those of the model have to be told apart by (`Runner`). Raises ValueError where the model cannot
        be loaded or nothing can be written, and GenerationError where workers die while they load it.
        """
        self._queue, self._weights, waited_for = Queue(jobs), weights, len(jobs)
        try:
            for number in range(min(len(self._specs), len(jobs))):
                self._start(number)
            while waited_for:
                connections = wait([worker.connection for worker in self.workers.values()])
                for worker in [each for each in self.workers.values() if each.connection in connections]:
                    record = self._hear(worker)
                    if record is not None:
                        waited_for -= 1
                        yield record
                for worker in self.workers.values():
                    if worker.is_ready and worker.job is None and (job := self._queue.take(worker.number)):
                        worker.give(job)
        finally:
            for worker in self.workers.values():
                worker.end()

    def _start(self, number: int) -> None:
        self.workers[number] = Worker(number, self._specs[number], self._folder, self._threads, self._weights)

    def _hear(self, worker: Worker) -> Record | None:
        """What a worker has to say: a record, where it has made one."""
        try:
            kind, said = worker.connection.recv()
        except (EOFError, OSError):
            return self._bury(worker)
        if kind == "refused":
            raise ValueError(said)
        if kind == "ready":
            worker.is_ready, self._deaths = True, 0
            return None
        worker.job = None
        return said

    def _bury(self, worker: Worker) -> Record | None:
        """A worker is dead: its job waits again, or has failed; another worker takes its place where jobs wait."""
        job, cause, record = worker.job, worker.cause_of_death(), None
        worker.connection.close()
        del self.workers[worker.number]
        self._queue.leave(worker.number)
        self._deaths += not worker.is_ready
        if self._deaths >= ATTEMPTS:
            raise GenerationError(
                f"{self._deaths} workers died while they loaded the model ({cause}): if memory ran out, pass fewer "
                "--workers."
            )
        if job is not None:
            self._lost[job.name] += 1
            if self._lost[job.name] < ATTEMPTS:
                self.retries += 1
                self._queue.put_back(job)
            else:
                said = f"{ATTEMPTS} workers died at it, the last one by {cause}"
                record = self._folder.finished(job) or self._folder.fail(job, said)  # it may have died once it was made
        if len(self._queue):
            self._start(worker.number)
        return record


def _work(connection: Connection, spec: ModelSpec, folder: Folder, threads: int, weights: str | None) -> None:
    """What a worker does, in its process: load, then a job at a time, until it is told to end or the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.disable()
    warnings.simplefilter("ignore")
    parent = multiprocessing.parent_process()
    try:
        from .runner import Runner

        runner = Runner(spec, folder, threads, weights)
        connection.send(("ready", None))
        while (job := connection.recv()) is not None:
            connection.send(("made", runner(job, cancel=lambda: parent is None or not parent.is_alive())))
    except (EOFError, BrokenPipeError, ConnectionResetError, Cancelled):  # the parent is gone
        return
    except Exception as error:
        known = isinstance(error, (ValueError, GenerationError))
        with contextlib.suppress(OSError):
            connection.send(("refused", str(error) if known else f"{type(error).__name__}: {one_line(error)}."))


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Processes that are started within ignore interrupts. In the main thread, which alone may say so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
