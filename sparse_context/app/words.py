"""What goes wrong, as toasts with the library's own sentences."""

import functools
import inspect
from collections.abc import Callable, Iterator
from html import escape
from typing import Any

import gradio as gr

from ..pipelines.errors import GenerationError
from ..pipelines.hub import one_line

SECONDS = 8  # that a toast stays


def sentence(error: Exception) -> str:
    """An error in one line: as the library says it, or what a defect was called."""
    known = isinstance(error, (ValueError, GenerationError, OSError))
    return " ".join(str(error).split()) if known else f"{type(error).__name__}: {one_line(error)}."


def toast(text: str) -> gr.Error:
    """To be raised: a toast with this text."""
    return gr.Error(escape(text, quote=False), duration=SECONDS, print_exception=False)


def warn(text: str) -> None:
    """A toast beside what did work."""
    gr.Warning(escape(text, quote=False), duration=SECONDS)


def in_words(handler: Callable) -> Callable:
    """What goes wrong in `handler`, a function or a generator, becomes a toast."""

    @functools.wraps(handler)
    def once(*args: Any, **kwargs: Any) -> Any:
        try:
            return handler(*args, **kwargs)
        except Exception as error:
            raise (error if isinstance(error, gr.Error) else toast(sentence(error))) from None

    @functools.wraps(handler)
    def stepwise(*args: Any, **kwargs: Any) -> Iterator[Any]:
        try:
            yield from handler(*args, **kwargs)
        except Exception as error:
            raise (error if isinstance(error, gr.Error) else toast(sentence(error))) from None

    return stepwise if inspect.isgeneratorfunction(handler) else once
