"""The jobs of a batch by Ray Data: actors on one machine or many, each with a pipeline of its own.

All machines need the pictures and the output folder under the same paths, for every actor writes what it makes, as a
worker of one machine does. An actor that dies is started again by Ray, and gets the job again that it was at: once, for
it counts in the folder how often it began.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from ..pipelines.spec import ModelSpec
from .cluster import say_what_is_missing
from .folder import Folder, Record
from .jobs import Job
from .workers import ATTEMPTS


class RayPool:
    """Actors that make jobs, in the place of `workers.Pool`. `ray` has to be connected: `cluster.connected`."""

    def __init__(self, spec: ModelSpec, folder: Folder, threads: int, actors: int, gpus: float = 0.0) -> None:
        """actors: how many. threads: of each one, and as many CPUs as it takes of a machine. gpus: that each one takes;
        several share one at a part of 1."""
        self.retries = 0
        self._spec, self._folder, self._threads, self._actors, self._gpus = spec, folder, threads, actors, gpus

    def run(self, jobs: Sequence[Job], weights: str | None = None) -> Iterator[Record]:
        """Make the jobs; yields their records as they come. Raises ValueError where the model cannot be loaded or
        nothing can be written."""
        import ray.data

        actors = min(self._actors, len(jobs))
        say_what_is_missing(ray, actors, self._threads, self._gpus)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        rows = ray.data.from_items([{"number": i} for i in range(len(jobs))], override_num_blocks=len(jobs)).map(
            Actor,
            fn_constructor_args=(jobs, self._spec, self._folder, self._threads, weights),
            compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=1),
            num_cpus=self._threads,
            num_gpus=self._gpus,
        )
        for row in rows.iter_rows():  # actors that are left over end with the connection
            if row["refused"]:
                raise ValueError(row["refused"])
            self.retries += row["again"]
            yield json.loads(row["record"])


class Actor:
    """What runs on an actor: a runner, which is loaded once."""

    def __init__(self, jobs: Sequence[Job], spec: ModelSpec, folder: Folder, threads: int, weights: str | None) -> None:
        import logging
        import warnings

        logging.disable()
        warnings.simplefilter("ignore")
        self.jobs, self.folder, self.refused = jobs, folder, ""
        from .runner import Runner

        try:
            self.runner = Runner(spec, folder, threads, weights)
        except Exception as error:  # which Ray would try again, and wrap in its own words
            self.refused = str(error)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        job, answer = self.jobs[int(row["number"])], {"record": "", "refused": self.refused, "again": False}
        if self.refused:
            return answer
        try:
            begun = self.folder.begin(job)
            if begun > ATTEMPTS and self.folder.finished(job) is None:
                record = self.folder.fail(job, f"{ATTEMPTS} actors died at it")
            else:
                record = self.runner(job)
            self.folder.end(job)
        except (ValueError, OSError) as error:  # nothing can be written
            return answer | {"refused": str(error)}
        return answer | {"record": json.dumps(record), "again": begun > 1}
