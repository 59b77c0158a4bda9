"""The command `sparse-context`: options in, the work below, results out. What it knows of its own is options and files.

Bad input is one sentence on stderr and exit code 2, as is what fails in the middle; what was finished by then, such as
cells of an evaluation or checkpoints, stays. Heavy imports happen inside the commands.
"""

import contextlib
import io
import logging
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
    for stream in (sys.stdout, sys.stderr):  # a name may hold what the terminal's encoding does not
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with _quiet():
            code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except (ValueError, GenerationError, OSError) as error:
        _fail(str(error) or type(error).__name__)
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
    "lora_scale": "--lora-scale",
    "random_weights": "--random-weights",
    "train_batch_size": "--train-batch-size",
    "validation_data": "--validation-data",
    "resume='latest'": "--resume latest",
}
"""Names of Python, as messages have them, and what the command calls the same."""

_PARAMETER = re.compile(rf"(?<![\w/\\.'-])(?:{'|'.join(map(re.escape, PARAMETERS))})(?![\w/\\'-]|\.\w)")


def _fail(message: str) -> None:
    said = _PARAMETER.sub(lambda found: PARAMETERS[found[0]], " ".join(message.split()))
    print(f"sparse-context: {said}", file=sys.stderr)
    sys.exit(2)
