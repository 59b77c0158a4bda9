"""The real command, in a process of its own."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest

from cli.shared import COMMAND, listing


@pytest.mark.slow
def test_help_and_a_call_without_arguments(tmp_path):
    for arguments in (["--help"], []):
        done = subprocess.run([*COMMAND, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        assert all(name in done.stdout for name in ("generate", "select", "demo"))


@pytest.mark.slow
def test_the_real_command_makes_a_picture_and_valid_json(tiny_model, inputs, tmp_path):
    arguments = ["generate", "-m", tiny_model, "--image", inputs / "a.png", "--prompt", "кот 😀", "--json"]
    done = subprocess.run(
        [*COMMAND, *arguments, "--output", "o 猫.png"], cwd=tmp_path, capture_output=True, timeout=120
    )
    assert done.returncode == 0
    assert json.loads(done.stdout)["output"] == "o 猫.png"
    bars = done.stderr.decode().replace("\r", "\n").split("\n")
    assert all("it/s]" in line or "0/2" in line for line in bars if line)
    assert listing(tmp_path) == ["o 猫.png"]


@pytest.mark.slow
def test_the_real_command_refuses_in_one_sentence(models, inputs, tmp_path):
    for arguments in (
        ["generate", "-m", models / "partial weights", "--image", inputs / "a.png", "--prompt", "x"],
        ["select", inputs / "truncated.png"],
    ):
        done = subprocess.run([*COMMAND, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("sparse-context: ") and done.stderr.count("\n") == 1
        assert listing(tmp_path) == []


@pytest.mark.slow
def test_names_and_prompts_that_the_terminal_cannot_show(inputs, tmp_path):
    """A terminal of ASCII only, and on Linux a name that is no text at all: the picture is written and told."""
    names = ["猫.png", *([os.fsdecode(b"\xff\xfe.png")] if sys.platform == "linux" else [])]
    for name in names:
        shutil.copy(inputs / "a.png", tmp_path / name)
        done = subprocess.run(
            [*COMMAND, "select", name, "--output", "to " + name],
            cwd=tmp_path,
            env={**os.environ, "PYTHONIOENCODING": "ascii"},
            capture_output=True,
            timeout=60,
        )
        assert (done.returncode, done.stderr) == (0, b"")
        assert b"\nwrote to \\" in done.stdout
    assert len(listing(tmp_path)) == 2 * len(names)


@pytest.mark.slow
def test_an_interrupted_run_ends_quietly(tiny_model, inputs, tmp_path):
    arguments = ["generate", "-m", tiny_model, "--image", inputs / "a.png", "--prompt", "x", "--steps", "1000"]
    piped: dict = {"cwd": tmp_path, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}

    def as_from_a_terminal() -> None:  # what was started in the background ignores interrupts, and so do its children
        signal.signal(signal.SIGINT, signal.default_int_handler)

    with subprocess.Popen([*COMMAND, *arguments], preexec_fn=as_from_a_terminal, **piped) as run:
        try:
            shown = b""  # steps have to be under way: an interrupt in an import may be swallowed there
            while not re.search(rb" [1-9]\d*/1000", shown):
                byte = run.stderr.read(1)
                assert byte, shown
                shown += byte
            run.send_signal(signal.SIGINT)
            out, err = run.communicate(timeout=300)
        finally:
            run.kill()
    assert run.returncode == 130
    assert out == b"" and b"Traceback" not in err
    assert listing(tmp_path) == []
