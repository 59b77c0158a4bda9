"""What surrounds the application: who may ask, and how much they may send, before anything is read or stored.

It is one layer of ASGI and not a middleware of the framework, since those read the body first.
"""

import asyncio
import hmac
import logging
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import quote, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError, internal
from .metrics import Metrics
from .settings import LOOPBACK, Settings

OPEN = ("/health", "/ready")
"""What is answered without a key: it says nothing but whether the server is there."""

PATHS = {*OPEN, "/metrics", "/openapi.json", "/v1/models", "/v1/images/edits", "/v1/images/generations"}
"""What the metrics count by name; anything else is "other"."""

LINGER_SECONDS, LINGER_BYTES = 2.0, 64 * 2**20
"""For so long, and so much, a refused body is read on and thrown away, for most clients read no answer before."""

log = logging.getLogger("sparse_context.server")


class Guard:
    """Checks key, host and origin, counts the body's bytes as they come, and holds slow senders to a time.

    The answer of whatever is inside gets an `x-request-id`. The body is refused at its declared length or at the byte
    that is too much: what reads it sees an `ApiError` in the place of the next part.
    """

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self.app = app
        self.settings = settings
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        body = _Body(scope, receive, self.settings)
        scope.setdefault("state", {})["request_id"] = request_id = uuid.uuid4().hex
        started = False

        async def answer(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers["x-content-type-options"] = "nosniff"
                headers["cache-control"] = "no-store"
                if not body.complete:
                    headers["connection"] = "close"
                    await body.drain()
                seen.status, started = message["status"], True
            await send(message)

        with _logged(scope, request_id, self.metrics) as seen:
            try:
                self._check(scope)
                await self.app(scope, body.receive, answer)
            except ApiError as error:
                await error.response()(scope, receive, answer)
            except Exception:
                log.exception("%s failed", request_id)
                if not started:  # else the server closes the connection
                    await internal().response()(scope, receive, answer)

    def _check(self, scope: Scope) -> None:
        """Raise `ApiError` for a request that is not to be read any further."""
        headers = Headers(scope=scope)
        if self.settings.api_key is None:
            _check_host(headers)
        elif scope["path"] not in OPEN:
            _check_key(headers, self.settings.api_key)
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self.settings.body:
            raise too_large(self.settings.body)


def too_large(most: int) -> ApiError:
    return ApiError(
        413, f"The request has more than {most} bytes: send smaller or fewer pictures.", code="request_too_large"
    )


def _check_key(headers: Headers, key: str) -> None:
    kind, _, given = headers.get("authorization", "").partition(" ")
    if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("latin-1", "replace"), key.encode()):
        raise ApiError(
            401,
            "The API key is missing or wrong: send it as 'Authorization: Bearer KEY'.",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def _check_host(headers: Headers) -> None:
    """Without a key whoever reaches the port is served, so nothing may reach it by way of a browser: no page of another
    site, and no name that resolves to this machine."""
    for name, given in (("Host", headers.get("host", "")), ("Origin", headers.get("origin"))):
        if given is None:
            continue
        try:
            host = urlsplit(given if name == "Origin" else f"//{given}").hostname
        except ValueError:
            host = None
        if host not in LOOPBACK:
            raise ApiError(
                403,
                f"This server has no API key, so it answers this machine alone, and {name} is {given[:100]!r}: call it "
                "by 127.0.0.1, or start it with a key.",
                code="host_not_allowed",
            )


class _Body:
    """The parts of a request's body as they come, counted."""

    def __init__(self, scope: Scope, receive: Receive, settings: Settings) -> None:
        headers = Headers(scope=scope)
        self._receive = receive
        self._settings = settings
        self._bytes = 0
        self._due = time.monotonic() + settings.upload_seconds
        self.complete = "transfer-encoding" not in headers and headers.get("content-length", "0") == "0"

    async def receive(self) -> Message:
        """The next message. Raises `ApiError` for a byte too many, and once the time for the body is up."""
        if self.complete:  # what comes now is that the client leaves
            return await self._receive()
        try:
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + self._due - time.monotonic()):
                message = await self._receive()
        except TimeoutError:
            raise ApiError(
                408,
                f"The request did not arrive within {self._settings.upload_seconds:g} s: send smaller pictures, or "
                "over a faster connection.",
                code="upload_timeout",
            ) from None
        self._bytes += len(message.get("body", b""))
        self.complete = message["type"] != "http.request" or not message.get("more_body", False)
        if self._bytes > self._settings.body:
            raise too_large(self._settings.body)
        return message

    async def drain(self) -> None:
        """Read on what is not wanted any more, within bounds."""
        try:
            async with asyncio.timeout(LINGER_SECONDS):
                while not self.complete and self._bytes < self._settings.body + LINGER_BYTES:
                    message = await self._receive()
                    self._bytes += len(message.get("body", b""))
                    self.complete = message["type"] != "http.request" or not message.get("more_body", False)
        except TimeoutError:
            pass


class _Seen:
    status = 499  # as some servers call it where the client left before there was an answer


@contextmanager
def _logged(scope: Scope, request_id: str, metrics: Metrics) -> Iterator[_Seen]:
    """Count a request and write its line, which has neither prompts nor addresses."""
    start, seen = time.monotonic(), _Seen()
    try:
        yield seen
    finally:
        path = scope["path"] if scope["path"] in PATHS else "other"
        metrics.requests.labels(path, str(seen.status)).inc()
        seconds = time.monotonic() - start
        shown = quote(scope["path"], safe="/")[:200]
        log.info("%s %s %s %d %.3f s", request_id, scope["method"][:10], shown, seen.status, seconds)
