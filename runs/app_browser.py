"""The app in a process of its own, and a browser in front of it: what its tests, its pictures and its timings share."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
PATIENCE = 300  # seconds until the app answers: a busy machine is no error

WATCHED = """
import sys

def note(event, details):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        with open({file!r}, "a", encoding="utf-8") as file:
            print(event, details[0] if event == "socket.getaddrinfo" else details[1], file=file)

sys.addaudithook(note)
from sparse_context.__main__ import main
main()
"""
"""The command, with a line in a file for each address that it looks for or speaks to."""


def find_browser() -> str | None:
    """Chromium or Chrome, as it is installed; None where it is not."""
    return next((path for path in map(shutil.which, PROGRAMS) if path), None)


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def running_app(folder: Path, *arguments: object) -> Iterator[str]:
    """The app, at the address that this yields, until the block ends; `folder` gets `addresses.txt` and `log.txt`.

    arguments: of the command. Raises RuntimeError with what it printed where it does not start.
    """
    port, log = free_port(), folder / "log.txt"
    command = [
        sys.executable,
        "-c",
        WATCHED.format(file=str(folder / "addresses.txt")),
        "app",
        "--port",
        port,
        *arguments,
    ]
    environment = {**os.environ, "TMPDIR": str(folder), "PYTHONUNBUFFERED": "1"}
    with log.open("w", encoding="utf-8") as file:
        app = subprocess.Popen([*map(str, command)], stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        end = time.monotonic() + PATIENCE
        while "Open http" not in log.read_text(encoding="utf-8"):
            if app.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"The app does not start: {log.read_text(encoding='utf-8')}")
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        if app.poll() is None:
            app.send_signal(signal.SIGTERM)
        app.wait()


@contextmanager
def running_browser(program: str) -> Iterator[Any]:
    """A browser of Playwright."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


class App:
    """The app's page with the embedded model, as its user has it."""

    def __init__(self, page: Any, address: str) -> None:
        self.page = page
        page.set_default_timeout(600_000)
        page.goto(address)
        page.wait_for_selector("#files")

    def take(self, example: str, references: int) -> None:
        """Choose an example, which has so many references."""
        if not self.page.locator("#examples").is_visible():
            self.page.get_by_role("button", name="Examples").click()
        self.page.locator("#examples button", has=self.page.locator(f"img[alt='{example}']")).click()
        self.page.wait_for_selector(f"#reference-{references} .count")
        self.page.wait_for_function("n => document.querySelectorAll('.overlay img').length === n", arg=references)

    def generate(self) -> float:
        """Make the images; seconds of the call with the kept tokens, as the page says them."""
        self.page.click("#generate")
        self.page.wait_for_selector("#status .progress")
        self.page.wait_for_selector("#status .progress", state="detached")
        if self.page.get_by_label("Compare with all tokens").is_checked():
            self.page.wait_for_selector("#result .compare")
        return float(self.page.inner_text("#figures tr:last-child td"))
