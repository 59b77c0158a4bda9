"""The command `sparse-context`: options in, the work below, results out. What it knows of its own is options and files.

Bad input is one sentence on stderr and exit code 2, as is what fails in the middle; what was finished by then, such as
cells of an evaluation or checkpoints, stays. Heavy imports happen inside the commands.
"""

import contextlib
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator

import typer

from ..pipelines.errors import GenerationError
from . import app as app_command
from . import batch, bench, demo, evaluate, generate, manifest, recommend, select, serve, train

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Reference-conditioned image generation with a fraction of the reference tokens.",
)
COMMANDS = (
    generate.generate,
    select.select,
    recommend.recommend,
    batch.batch,
    manifest.manifest,
    train.train,
    evaluate.evaluate,
    demo.demo,
    bench.bench,
    app_command.app,
    serve.serve,
)
for command in COMMANDS:
    app.command()(command)


def main() -> None:
    """Run the command. Bad input ends in one sentence on stderr and exit code 2."""
    # diffusers imports ONNX Runtime, where it is installed, which reports its use to its makers unless told before
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    for stream in (sys.stdout, sys.stderr):  # a name may hold what the terminal's encoding does not
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with _quiet():
            code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except (ValueError, GenerationError, OSError) as error:
        _fail(_said(error))
    except (KeyboardInterrupt, EOFError):
        sys.exit(130)
    except Exception as error:
        # Typer's own errors about options know how to say themselves
        if not hasattr(error, "format_message"):
            raise
        _fail(error.format_message())
    else:
        sys.exit(code if isinstance(code, int) else 0)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what libraries log and warn of from stderr: what goes wrong is one sentence of our own."""
    logging.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


PARAMETERS = {
    "check_samples": "train --check-data",
    "cpu_offload": "--cpu-offload",
    "guidance_scale": "--guidance-scale",
    "lora_scale": "--lora-scale",
    "overview_layout": "--overview-layout",
    "random_weights": "--random-weights",
    "reference_max_pixels": "--reference-max-pixels",
    "train_batch_size": "--train-batch-size",
    "validation_data": "--validation-data",
    "resume='latest'": "--resume latest",
}
"""Names of Python, as messages have them, and what the command calls the same."""

_PARAMETER = re.compile(rf"(?<![\w/\\.'-])(?:{'|'.join(map(re.escape, PARAMETERS))})(?![\w/\\'-]|\.\w)")


def _said(error: Exception) -> str:
    """What an error says. One of the system's own names a file at most, and no way out."""
    if isinstance(error, OSError) and error.strerror and str(error).startswith("[Errno"):
        where = "The output" if error.filename is None else str(error.filename)
        return f"{where} cannot be used ({error.strerror}): name another file or folder, or make room there."
    return str(error) or type(error).__name__


def _fail(message: str) -> None:
    said = " ".join(message.split())
    if not said.startswith("The settings "):  # of a file, whose keys are Python's names
        said = _PARAMETER.sub(lambda found: PARAMETERS[found[0]], said)
    if sys.stderr is not None:  # closed, in which case `print` would take stdout
        print(f"sparse-context: {said}", file=sys.stderr)
    sys.exit(2)
