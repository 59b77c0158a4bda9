"""A runner: one engine that makes jobs into pictures and records. Every worker has one, on whatever machine it is."""

import os
from collections.abc import Callable

from ..cache import ReferenceCache
from ..evaluation.evaluate import engine_fingerprint
from ..images import WRITE_FORMATS
from ..pipelines.engine import Engine
from ..pipelines.errors import Cancelled
from ..pipelines.hub import one_line
from ..pipelines.load import hide_loading_bars
from ..pipelines.spec import ModelSpec
from .folder import Folder, Record, digests
from .jobs import Job


class Runner:
    """Makes jobs, one at a time, with a pipeline of its own. References that come again are encoded once."""

    def __init__(self, spec: ModelSpec, folder: Folder, threads: int | None = None, weights: str | None = None) -> None:
        """Load the pipeline. threads: of a CPU to compute with; None: torch's own choice. weights: what those of the
        model have to be told apart by (`evaluation.evaluate.engine_fingerprint`); None: they may be any.

        Raises what `load` raises, and ValueError for other weights.
        """
        import torch

        if threads is not None:
            torch.set_num_threads(threads)
        hide_loading_bars()
        self.folder = folder
        self.engine = Engine(spec, bar=False, cache=ReferenceCache())
        self.weights = engine_fingerprint(self.engine)
        if weights not in (None, self.weights):
            name = spec.model or "the embedded model"
            raise ValueError(
                f"The pictures in {folder.path} were made with other weights than {name} has now: choose another "
                "--output."
            )

    def __call__(self, job: Job, cancel: Callable[[], bool] | None = None) -> Record:
        """Make a job, and return its record, which is written by then, beside its picture.

        A job that is done is not made again. One that cannot be made is recorded with its reason. Raises `Cancelled` as
        an engine does, and PictureError where nothing can be written.
        """
        try:
            if (finished := self.folder.finished(job)) is not None:
                return finished
            pictures = [digest or "" for digest in digests(job)]
            generation = self.engine(job.read(), cancel=cancel)
            if max(generation.image.size) > (most := WRITE_FORMATS[self.folder.suffix][2]):
                said = "{}x{}".format(*generation.image.size)
                reason = f"The picture is {said} pixels, and {self.folder.suffix} holds {most} a side: choose png."
                return self.folder.fail(job, reason)
        except Cancelled:
            raise
        except Exception as error:  # whatever is wrong with one job, the others are made
            return self.folder.fail(job, one_line(error))
        return self.folder.save(job, generation.image, generation.to_dict(), self.weights, pictures)


def threads_of(workers: int) -> int:
    """Threads for each of so many workers on this machine: what OMP_NUM_THREADS says, or their share of the cores."""
    import torch

    said = os.environ.get("OMP_NUM_THREADS", "")
    return int(said) if said.isdigit() and int(said) > 0 else max(1, torch.get_num_threads() // workers)
