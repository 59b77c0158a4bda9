"""A batch, from its jobs to a summary: what is done already stays, what is missing is made, what fails is recorded."""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

from ..pipelines.spec import ModelSpec
from .cluster import check_gpus
from .folder import FAILED, Folder, Record
from .jobs import BadLine, Job
from .runner import threads_of
from .workers import Pool


@dataclass
class Summary:
    """What became of a batch.

    made: jobs that this run made. there: that an earlier one had. failed: records of those that cannot be made.
    retries: how often a worker died at a job that was then tried again. seconds: of the whole run.
    """

    made: int
    there: int
    failed: list[Record]
    retries: int
    seconds: float

    def to_dict(self) -> dict[str, object]:
        """The summary, for JSON."""
        return {
            "made": self.made,
            "there": self.there,
            "failed": len(self.failed),
            "retries": self.retries,
            "seconds": round(self.seconds, 3),
        }

    def __str__(self) -> str:
        parts = [f"made {self.made} of {self.made + self.there + len(self.failed)} pictures in {self.seconds:.1f} s"]
        parts += [f"{self.there} were there"] if self.there else []
        parts += [f"{len(self.failed)} failed"] if self.failed else []
        parts += [f"{self.retries} tried again after their worker had died"] if self.retries else []
        return ", ".join(parts)


class Maker(Protocol):
    """Whatever makes jobs: `workers.Pool`, or one of another kind. retries: jobs that it gave out again."""

    retries: int

    def run(self, jobs: Sequence[Job], weights: str | None) -> Iterator[Record]: ...


def run_batch(
    jobs: Sequence[Job | BadLine],
    spec: ModelSpec,
    output: Path,
    *,
    suffix: str = ".png",
    workers: int | None = None,
    ray_gpus: float | None = None,
) -> Summary:
    """Make the jobs into `output` (see folder.py), with a progress bar, and say what became of them.

    jobs: see `jobs.read_jobs`. suffix: of the pictures. workers: processes with a pipeline each; None: one for each
    CUDA device, or one. ray_gpus: have Ray run the workers, with so many GPUs for each (on_ray.py); None: no Ray.

    Raises ValueError, before anything is made, where an output would be written over an input or over a file that is
    not the batch's, or was made of another job or by other weights; and what `workers.Pool.run` raises.
    """
    specs, folder = specs_of(spec, workers), Folder(output if ray_gpus is None else output.absolute(), suffix)
    count = len(specs)
    threads = threads_of(count)
    if ray_gpus is not None:
        check_gpus(ray_gpus)
    with folder.opened():
        if ray_gpus is None:
            return make_missing(jobs, folder, Pool(specs, folder, threads))
        from .cluster import connected
        from .on_ray import RayPool

        with connected(cpus=count * threads):
            return make_missing(jobs, folder, RayPool(spec.with_whole_paths(), folder, threads, count, ray_gpus))


def make_missing(jobs: Sequence[Job | BadLine], folder: Folder, maker: Maker) -> Summary:
    """Let `maker` make what is missing in a folder that is open."""
    start = time.perf_counter()
    good = [job for job in jobs if isinstance(job, Job)]
    _check_outputs(good, folder)
    records = {job.name: record for job in good if (record := folder.finished(job)) is not None}
    missing = [job for job in good if job.name not in records]
    there, weights = len(records), next((record["weights"] for record in records.values()), None)
    bad = len(jobs) - len(good)
    with tqdm(total=len(jobs), initial=there + bad, desc="batch", unit="job", disable=not missing) as bar:
        for record in maker.run(missing, weights) if missing else ():
            records[record["name"]] = record
            bad += record["status"] == FAILED
            bar.set_postfix({"failed": bad} if bad else {}, refresh=False)
            bar.update()
    results = [records[job.name] if isinstance(job, Job) else _record_of(job) for job in jobs]
    folder.write_results(results)
    failed = [record for record in results if record["status"] == FAILED]
    made = len(results) - len(failed) - there
    return Summary(made, there, failed, maker.retries, time.perf_counter() - start)


def _record_of(line: BadLine) -> Record:
    return {"name": None, "where": line.where, "status": FAILED, "reason": " ".join(line.problems)}


def _check_outputs(jobs: Sequence[Job], folder: Folder) -> None:
    """Raise ValueError where an output of a job would be written over an input. `Folder.finished` looks at others."""
    inputs = {os.path.realpath(picture) for job in jobs for picture in job.pictures if isinstance(picture, Path)}
    place = os.path.realpath(folder.path)
    for job in jobs:
        output = folder.picture(job.name)
        if os.path.join(place, output.name) in inputs:
            raise ValueError(f"{output} is also an input and would be overwritten: choose another --output.")


def specs_of(spec: ModelSpec, workers: int | None) -> list[ModelSpec]:
    """The model for each worker, on a CUDA device of its own where there are several. Raises ValueError for a number of
    workers that cannot be."""
    import torch

    devices = torch.cuda.device_count() if spec.device is None else 0
    count = max(1, devices) if workers is None else workers
    if not 1 <= count <= 1024:
        raise ValueError(f"workers is {count}: pass a number from 1 to 1024.")
    if devices < 2:
        return [spec] * count
    return [replace(spec, device=f"cuda:{number % devices}") for number in range(count)]
