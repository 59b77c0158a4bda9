"""The output folder of a batch. Every file in it is written whole or not at all.

    NAME.png             the picture of a job that is done
    records/NAME.json    what became of it: its status, report, and what the job was told apart by
    results.jsonl        all records in the order of the jobs, once a run has ended

A job is done when its record says so and its picture is there: it is never made again. The record is written first, so
a picture without one is not the batch's, whenever a process was killed.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from ..images import check_output, save_picture, save_text
from ..samples import Member, Picture
from .jobs import Job

DONE, FAILED = "done", "failed"
TRIES = ".tries"
_PART = re.compile(r"\.[0-9a-f]{16}\.part")  # what `images` is writing, or was when its process was killed

Record = dict[str, Any]
"""What became of a job: "name", "where", "status", "reason" (of a failure), "output", "job" and "pictures" (what it was
told apart by), "weights" (of the model), and the report of its generation."""


class Folder:
    """The output folder of a batch, and the format of its pictures, a suffix such as ".png"."""

    def __init__(self, path: Path, suffix: str = ".png") -> None:
        self.path = path
        self.suffix = suffix

    def picture(self, name: str) -> Path:
        return self.path / f"{name}{self.suffix}"

    def record(self, name: str) -> Path:
        return self.path / "records" / f"{name}.json"

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Make the folder, and keep other batches out of it until the block ends. Leaves nothing that is half written.

        Raises ValueError where it cannot be written, or where another batch is at work in it.
        """
        from filelock import FileLock, Timeout

        try:
            (self.path / "records").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{self.path} cannot be a folder ({error.strerror}): choose another one.") from error
        check_output(self.picture("a"))
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise ValueError(f"Another batch is at work in {self.path}: wait for it, or choose another one.") from None
        try:
            self._sweep()
            yield
        finally:
            self._sweep()
            with contextlib.suppress(OSError):
                os.unlink(lock.lock_file)
            lock.release()

    def _sweep(self) -> None:
        """Remove what processes that were killed have left: files half written, and counts of tries."""
        for folder in (self.path, self.path / "records"):
            for entry in os.scandir(folder):
                if _PART.fullmatch(entry.name) or (folder.name == "records" and entry.name.endswith(TRIES)):
                    with contextlib.suppress(OSError):
                        os.unlink(entry)

    def read(self, name: str) -> Record | None:
        """The record of a job, or None where there is none that can be read."""
        try:
            record = json.loads(self.record(name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return record if isinstance(record, dict) else None

    def begin(self, job: Job) -> int:
        """Note that a job is begun; returns how often it was, since `opened` or `end`. For where whoever makes it may
        die, and nobody else counts."""
        with open(self._tries(job), "ab") as file:
            file.write(b".")
            return file.tell()

    def end(self, job: Job) -> None:
        """Forget how often a job was begun."""
        self._tries(job).unlink(missing_ok=True)

    def _tries(self, job: Job) -> Path:
        return self.path / "records" / f"{job.name}{TRIES}"

    def finished(self, job: Job) -> Record | None:
        """The record of a job that is done, or None where it is still to be made.

        Raises ValueError where what is there was made of another job, or by nobody here.
        """
        record, picture = self.read(job.name), self.picture(job.name)
        if not picture.is_file():
            return None
        if record is None or record.get("status") != DONE:
            raise ValueError(
                f"{picture} is there, and no record says that this batch made it: choose another --output, give the "
                "job another name, or remove the picture."
            )
        if record.get("job") != job.digest():
            what = "another prompt, model or settings"
        elif any(now is not None and now != then for now, then in zip(digests(job), record["pictures"], strict=True)):
            what = "other pictures"
        else:
            return record
        raise ValueError(
            f"{picture} was made with {what} than {job.where} says: give the job another name, choose another "
            "--output, or remove the picture to make it anew."
        )

    def save(
        self, job: Job, image: Image.Image, report: dict[str, Any], weights: str, pictures: Sequence[str]
    ) -> Record:
        """Keep the record of a job and then its picture. Raises PictureError where they cannot be written."""
        path = self.picture(job.name)
        record = self._write(
            {
                "name": job.name,
                "where": job.where,
                "status": DONE,
                "output": path.name,
                **report,
                "job": job.digest(),
                "pictures": [*pictures],
                "weights": weights,
            }
        )
        save_picture(image, path)
        return record

    def fail(self, job: Job, reason: str) -> Record:
        """Record why a job failed."""
        record = {"name": job.name, "where": job.where, "status": FAILED, "reason": reason}
        return self._write(record)

    def _write(self, record: Record) -> Record:
        save_text(json.dumps(record, indent=2) + "\n", self.record(record["name"]))
        return record

    def write_results(self, records: Sequence[Record]) -> Path:
        """Write all records into one file, a line each."""
        path = self.path / "results.jsonl"
        save_text("".join(json.dumps(record) + "\n" for record in records), path)
        return path


def digests(job: Job) -> list[str | None]:
    """SHA-256 of each picture that a job reads; None for one that cannot be read."""
    return [_digest(picture) for picture in job.pictures]


def _digest(picture: Picture) -> str | None:
    if isinstance(picture, bytes):
        return hashlib.sha256(picture).hexdigest()
    try:
        if isinstance(picture, Member):
            return _digest(picture.read())
        status = os.stat(picture)
        return _digest_of_file(picture, status.st_size, status.st_mtime_ns)
    except (OSError, ValueError):  # ValueError: a null byte in the name
        return None


@lru_cache(maxsize=4096)
def _digest_of_file(path: Path, size: int, changed: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
