"""What the runs about the server share: the command in a process of its own, its memory, and plain requests to it."""

import contextlib
import http.client
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from PIL import Image

from sparse_context.embedded.demo import read_examples

PATIENCE = 900.0
"""Seconds that a request may take."""


class Served:
    """`sparse-context serve` on the embedded model, on a port of its own, ready.

    `folder` is the only place where it may put temporary files.
    """

    def __init__(self, process: subprocess.Popen, port: int, folder: Path) -> None:
        self.process = process
        self.port = port
        self.folder = folder

    def memory(self) -> float:
        """Its resident set, in MiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024  # type: ignore[index]

    def open_files(self) -> int:
        """How many files and connections it has open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def left_over(self) -> list[str]:
        """Files in its temporary folder, and those that it deleted and still has open."""
        links = []
        for number in os.listdir(f"/proc/{self.process.pid}/fd"):
            with contextlib.suppress(OSError):
                links.append(os.readlink(f"/proc/{self.process.pid}/fd/{number}"))
        return [*os.listdir(self.folder), *(link for link in links if link.startswith(str(self.folder)))]

    def ask(
        self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> tuple[int, bytes]:
        """Status and body of a request."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)) as connection:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, response.read()

    def edit(self, fields: Sequence[tuple[str, str | bytes]]) -> tuple[int, bytes]:
        """Status and body of an edit of these fields, files as bytes."""
        kind, body = multipart(fields)
        return self.ask("POST", "/v1/images/edits", body, {"Content-Type": kind})

    def figures(self) -> dict[str, float]:
        """The figures of its metrics, by name and labels."""
        lines = self.ask("GET", "/metrics")[1].decode().splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


@contextlib.contextmanager
def served(*options: str, threads: int | None = None) -> Iterator[Served]:
    """A server with these options. threads: of the pipeline on a CPU; None: as many as there are cores."""
    with tempfile.TemporaryDirectory(prefix="served-") as folder, tempfile.TemporaryFile("a+") as log:
        environment = {**os.environ, "TMPDIR": folder}
        environment |= {"OMP_NUM_THREADS": str(threads)} if threads else {}
        command = [sys.executable, "-m", "sparse_context", "serve", "--port", "0", *options]
        with subprocess.Popen(command, env=environment, stderr=log) as process:
            try:
                server = Served(process, _read_port(process, log), Path(folder))
                _wait_until(process, lambda: server.ask("GET", "/ready")[0] == 200)
                yield server
            finally:
                process.kill()


def _read_port(process: subprocess.Popen, log: TextIO) -> int:
    """The port, once the log names it. The log must be open for appending: the server shares our place in it."""
    found: list[str] = []

    def named() -> bool:
        log.seek(0)
        found[:] = re.findall(r"on http://127\.0\.0\.1:(\d+)$", log.read(), re.MULTILINE)
        return bool(found)

    _wait_until(process, named)
    return int(found[0])


def _wait_until(process: subprocess.Popen, is_so: Callable[[], bool], patience: float = 120.0) -> None:
    """Raises SystemExit if that takes more than `patience` seconds, or the process has ended."""
    end = time.monotonic() + patience
    while process.poll() is None and time.monotonic() < end:
        with contextlib.suppress(ConnectionError):
            if is_so():
                return
        time.sleep(0.2)
    raise SystemExit("The server does not start.")


def multipart(fields: Sequence[tuple[str, str | bytes]]) -> tuple[str, bytes]:
    """Type and bytes of a form."""
    parts = []
    for name, value in fields:
        file = '; filename="file"' if isinstance(value, bytes) else ""
        head = f'--limit\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode()
        parts.append(head + (value if isinstance(value, bytes) else value.encode()) + b"\r\n")
    return "multipart/form-data; boundary=limit", b"".join(parts) + b"--limit--\r\n"


def scene(references: int) -> tuple[str, list[Image.Image]]:
    """Prompt and pictures of an example of the embedded model with so many references."""
    example = next(each for each in read_examples() if len(each["references"]) == references)
    return example["prompt"], example["references"]


def written(picture: Image.Image) -> bytes:
    """A picture as the bytes of a PNG."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def settled(server: Served, seconds: float = 5.0) -> float:
    """Its memory once nothing runs or waits any more, and so many seconds later."""
    end = time.monotonic() + PATIENCE
    while any(server.figures()[f"sparse_context_{name}"] for name in ("queue_jobs", "running_jobs", "uploads")):
        if time.monotonic() > end:
            raise SystemExit("The server does not come to rest.")
        time.sleep(0.5)
    time.sleep(seconds)
    return server.memory()


def error_of(body: bytes) -> dict:
    """The error in a body, of which the shape is checked."""
    error = json.loads(body)["error"]
    if set(error) != {"message", "type", "param", "code"}:
        raise SystemExit(f"An error has another shape: {error}")
    return error
