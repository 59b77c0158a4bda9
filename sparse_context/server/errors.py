"""Errors as the official client reads them: a status, and `{"error": {"message", "type", "param", "code"}}`."""

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from ..pipelines.errors import GenerationError

KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
"""By status; what is not here is an `invalid_request_error`, or from 500 up a `server_error`."""

CODES = {400: "invalid_value", 404: "not_found", 405: "method_not_allowed", 500: "internal_error"}


class ApiError(Exception):
    """What a client is told instead of an answer: one sentence, the field that it is about, a word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = None if param is None else param.encode("utf-8", "backslashreplace").decode("utf-8")
        self.code = code or CODES.get(status)
        self.headers = dict(headers or {})

    @property
    def error(self) -> dict[str, str | None]:
        """The object that stands under "error"."""
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"message": self.message, "type": kind, "param": self.param, "code": self.code}

    def response(self) -> JSONResponse:
        return JSONResponse({"error": self.error}, self.status, self.headers)


def too_busy(seconds: float) -> ApiError:
    """A full queue, which will have room in about this many seconds."""
    wait = max(1, min(60, round(seconds)))
    return ApiError(
        429, f"The queue is full: try again in {wait} s.", code="queue_full", headers={"Retry-After": str(wait)}
    )


def too_late(seconds: float) -> ApiError:
    """A job that was not done within its deadline; to send it again would only make the queue longer."""
    return ApiError(
        504,
        f"The request was not answered within {seconds:g} s: ask for fewer steps or pictures, or try again later.",
        code="deadline_exceeded",
        headers={"x-should-retry": "false"},
    )


def stopping() -> ApiError:
    """A job that the server ends before it is done, as it was told to stop."""
    return ApiError(503, "The server is stopping: send the request to another one.", code="stopping")


def not_loaded() -> ApiError:
    """A server whose model does not load."""
    return ApiError(503, "The model does not load: the server's log says why.", code="not_loaded")


def internal() -> ApiError:
    """A defect, of which the operator's log says more."""
    return ApiError(500, "The server failed at this request: its log says why.", headers={"x-should-retry": "false"})


def from_exception(error: Exception, subjects: Mapping[str, str] | None = None) -> ApiError | None:
    """What an engine's error means to a client, None for a defect. subjects: fields by the words that it may use."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, GenerationError):
        return ApiError(500, str(error), code="generation_failed", headers={"x-should-retry": "false"})
    if isinstance(error, ValueError):
        return ApiError(400, sentence(str(error)), param=_subject(str(error), subjects or {}))
    return None


WORDS = {
    "leave inpaint out": "leave mask out",
    "pass inpaint, a mask that is white where to paint": "send mask, a picture that is transparent where to paint",
    "pass selector=mask([...]) with one mask per reference, or an RGBA picture": "send reference_masks, one for each "
    "image, or pictures with an alpha channel",
}
"""What the library says to those who program, and what it comes to here."""


def sentence(text: str) -> str:
    """A text on one line, in the words of a client, which ends as a sentence does."""
    text = " ".join(text.split())
    for words, ours in WORDS.items():
        text = text.replace(words, ours)
    return text if text.endswith((".", "?", "!")) else f"{text}."


def _subject(text: str, subjects: Mapping[str, str]) -> str | None:
    """The field that a sentence names first."""
    words = (word.strip(".,:;'\"()") for word in text.split())
    return next((subjects[word] for word in words if word in subjects), None)


def short(value: Any, most: int = 80) -> str:
    """A value as Python writes it, cut to so many characters."""
    text = repr(value[: most + 1] if isinstance(value, (str, bytes, list)) else value)
    return text if len(text) <= most else f"{text[:most]}..."
