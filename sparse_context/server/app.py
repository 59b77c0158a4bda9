"""The routes: edits and generations as the official `openai` client calls them, and what operators ask for."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from ..pipelines.engine import Engine
from ..pipelines.settings import most_references
from .errors import ApiError, from_exception, internal, sentence, short, too_busy, too_late
from .fields import nest, read_json
from .guard import Guard
from .jobs import Done, Job
from .metrics import CONTENT_TYPE, Metrics
from .openapi import page
from .replies import events, reply
from .schema import SUBJECTS
from .settings import Settings
from .uploads import Uploads, take_uploads
from .wanted import Wanted, read_wanted
from .worker import Worker

FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")

LEFT = 499
"""The status that the log has for who left before there was an answer. Nobody gets it."""

TEXT_BYTES = 256 * 1024
"""Of one field of a form that is no file. A prompt of 32,000 characters has at most half of that."""

JSON_BYTES = 2**20
"""Of a body without files: a prompt of 32,000 characters has at most a third of that, however it is escaped."""


class Server:
    """What the routes need: a worker for one engine, the settings, and the figures.

    make_worker: what serves jobs, of the engine, the settings and the figures. Raises ValueError for a model that is
    not there or not supported.
    """

    def __init__(self, engine: Engine, settings: Settings, make_worker: Callable[..., Worker] = Worker) -> None:
        self.engine = engine
        self.settings = settings
        self.metrics = Metrics()
        if engine.cache is not None:
            self.metrics.watch_cache(engine.cache)
        self.worker = make_worker(engine, settings, self.metrics)
        self.most_references = most_references(engine.spec.model)
        self.started = int(time.time())
        self._uploads = 0
        self._opening = asyncio.Semaphore(1)  # pictures are opened one request at a time: they are large

    # Requests -------------------------------------------------------------------------------------------------------

    async def edits(self, request: Request) -> Response:
        """Pictures of a prompt and references."""
        _check_type(request, FORMS, "multipart/form-data, with the pictures as files")
        with self._uploading():
            form = await self._form(request)
            arrived = asyncio.get_running_loop().time()
            try:
                values = nest(form.multi_items())
                uploads = take_uploads(values, self.settings, self.most_references)
                wanted = read_wanted(values, self.settings, edits=True, is_form=True)
                job = await self._prepare(request, wanted, uploads, arrived)
                submitted = self.worker.submit(job, join=_may_join(request, wanted))
            except BaseException:
                await form.close()
                raise
        if submitted is not job:
            job.close()  # at once: until somebody listens to it, the other one may be dropped
        return await self._answer(request, submitted, wanted, "image_edit", arrived)

    async def generations(self, request: Request) -> Response:
        """Pictures of a prompt alone."""
        _check_type(request, ("application/json",), "application/json")
        with self._uploading():
            values = read_json(await _text(request))
            arrived = asyncio.get_running_loop().time()
            wanted = read_wanted(values, self.settings, edits=False, is_form=False)
            job = await self._prepare(request, wanted, Uploads(), arrived)
            submitted = self.worker.submit(job, join=_may_join(request, wanted))
        return await self._answer(request, submitted, wanted, "image_generation", arrived)

    @contextlib.contextmanager
    def _uploading(self) -> Iterator[None]:
        """While a body is read, and its pictures are looked at. Raises `ApiError` where there is no room for another
        one, or for what it would ask."""
        self.worker.check_room()
        if self._uploads >= self.settings.uploads:
            self.metrics.refused.inc()
            raise too_busy(1)
        self._uploads += 1
        self.metrics.uploads.set(self._uploads)
        try:
            yield
        finally:
            self._uploads -= 1
            self.metrics.uploads.set(self._uploads)

    async def _form(self, request: Request) -> Any:
        """The form of a request, whose files are on disk from 1 MiB on."""
        files = 2 * self.settings.references + 2
        try:
            return await request.form(max_files=files, max_fields=200, max_part_size=TEXT_BYTES)
        except HTTPException as error:
            raise ApiError(400, f"The form cannot be read: {error.detail}", code="invalid_form") from None

    async def _prepare(self, request: Request, wanted: Wanted, uploads: Uploads, arrived: float) -> Job:
        """The job that a request asks for, once its pictures were looked at. arrived: when its body had, by the loop's
        clock. Raises `ApiError` for what it asks, and where its deadline comes first."""

        def look() -> str:
            digest = uploads.digest()
            uploads.check()
            self.worker.check(uploads.add_to(wanted.request))
            return digest

        try:
            async with asyncio.timeout_at(arrived + self.settings.deadline):
                await self._opening.acquire()
        except TimeoutError:
            raise too_late(self.settings.deadline) from None
        try:
            digest = await asyncio.to_thread(look)
        except Exception as error:
            raise from_exception(error, SUBJECTS) or error from None
        finally:
            self._opening.release()
        again = request.headers.get("idempotency-key", "")
        return Job(
            lambda: uploads.add_to(wanted.request),
            wanted.request.prompt,
            wanted.seeds,
            wanted.digest(digest, again),
            wanted.alike(digest),
            wanted.partials,
            uploads.close,
        )

    async def _answer(self, request: Request, job: Job, wanted: Wanted, kind: str, arrived: float) -> Response:
        """The answer of a job, or its events as they come."""
        request_id = request.state.request_id
        waiting = _Waiting(self, request, job, arrived)
        if wanted.stream:
            late = too_late(self.settings.deadline)
            return _Events(waiting, events(waiting.listener, waiting.due, late, wanted, kind, request_id))
        try:
            done = await waiting.end()
            if done is None:
                return Response(status_code=LEFT)
            body = await asyncio.to_thread(reply, done, wanted, request_id)
            return Response(body, media_type="application/json")
        finally:
            waiting.leave()

    # What else there is ---------------------------------------------------------------------------------------------

    async def models(self) -> dict[str, Any]:
        """The one model, in a list."""
        return {"object": "list", "data": [await self.model(self.settings.name)]}

    async def model(self, model: str) -> dict[str, Any]:
        """The model, by its id."""
        if model != self.settings.name:
            raise ApiError(
                404,
                f"There is no model {model[:100]!r}: this server has {self.settings.name!r}.",
                param="model",
                code="model_not_found",
            )
        return {"id": model, "object": "model", "created": self.started, "owned_by": "sparse-context"}

    async def health(self) -> dict[str, str]:
        """Whether the server is there at all."""
        return {"status": "ok"}

    async def ready(self) -> Response:
        """Whether it would begin with a request at once: 503 while the model loads, and once it is to stop."""
        state = "stopping" if self.worker.is_stopping else "ready" if self.worker.ready else "loading"
        state = "not loaded" if self.worker.failure is not None else state
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)

    async def figures(self) -> Response:
        """What Prometheus reads."""
        return Response(self.metrics.text(), media_type=CONTENT_TYPE)


async def _text(request: Request) -> bytes:
    """The body of a request that brings no files. Raises `ApiError` for one that is larger than any prompt."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > JSON_BYTES:
            raise ApiError(
                413, f"The body is larger than {JSON_BYTES} bytes: send a shorter one.", code="request_too_large"
            )
    return bytes(body)


class _Waiting:
    """One client that waits for a job: it leaves at its deadline, and when it hangs up."""

    def __init__(self, server: Server, request: Request, job: Job, arrived: float) -> None:
        self.server = server
        self.request = request
        self.job = job
        self.listener = job.listen()
        self.loop = asyncio.get_running_loop()
        self.arrived = arrived
        self.due = self.arrived + server.settings.deadline
        self.has_answer = False

    async def end(self) -> Done | None:
        """What the job comes to; None once the client has left. Raises `ApiError`."""
        leaves = asyncio.create_task(self._hangs_up())
        ends = asyncio.create_task(self.listener.end())
        try:
            await asyncio.wait((leaves, ends), timeout=self.due - self.loop.time(), return_when=asyncio.FIRST_COMPLETED)
            if ends.done():
                self.has_answer = True
                return ends.result()
            if leaves.done():
                return None
            raise too_late(self.server.settings.deadline)
        finally:
            leaves.cancel()
            ends.cancel()

    def leave(self) -> None:
        """Wait no more. What nobody waits for is cancelled, unless the client is about to ask again."""
        self.job.leave(self.listener)
        worker, settings = self.server.worker, self.server.settings
        if self.has_answer or self.loop.time() >= self.due:
            worker.drop(self.job, "deadline")
        elif self._comes_back():
            self.loop.call_later(settings.grace, worker.drop, self.job, "client")
        else:
            worker.drop(self.job, "client")

    async def _hangs_up(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass

    def _comes_back(self) -> bool:
        """Whether a client that has left will send the request again: it said so, or its own time was up."""
        headers = self.request.headers
        if "idempotency-key" in headers:
            return True
        try:
            patience = float(headers.get("x-stainless-read-timeout", ""))
        except ValueError:
            return False
        return self.loop.time() - self.arrived >= 0.9 * patience


class _Events(StreamingResponse):
    """An answer in events. Who asked for them leaves when they end, wherever that is."""

    def __init__(self, waiting: _Waiting, packed: AsyncIterator[bytes]) -> None:
        super().__init__(packed, media_type="text/event-stream")
        self.waiting = waiting

    async def stream_response(self, send: Send) -> None:
        await super().stream_response(send)
        self.waiting.has_answer = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.waiting.leave()


def _check_type(request: Request, kinds: tuple[str, ...], advice: str) -> None:
    """Raise `ApiError` for a body of another kind, by its Content-Type."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in kinds:
        raise ApiError(415, f"The body's type is {short(kind)}: send {advice}.", code="unsupported_type")


def _may_join(request: Request, wanted: Wanted) -> bool:
    """Whether a job that asks for the same is as good: the pictures would be the same, or the client asks again."""
    retries = request.headers.get("x-stainless-retry-count", "0")
    return wanted.is_seeded or retries not in ("", "0") or "idempotency-key" in request.headers


def wrap(server: Server) -> Guard:
    """The routes of a server, with the guard around them."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        server.worker.start()
        yield
        await asyncio.to_thread(server.worker.stop)

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url="/openapi.json", redirect_slashes=False)
    app.openapi = lambda: page(server.settings)  # type: ignore[method-assign]
    for kind in (ApiError, HTTPException, ClientDisconnect, Exception):
        app.add_exception_handler(kind, _refuse)
    for path, handler, method in (
        ("/v1/images/edits", server.edits, "POST"),
        ("/v1/images/generations", server.generations, "POST"),
        ("/v1/models", server.models, "GET"),
        ("/v1/models/{model:path}", server.model, "GET"),
        ("/health", server.health, "GET"),
        ("/ready", server.ready, "GET"),
        ("/metrics", server.figures, "GET"),
    ):
        app.add_api_route(path, handler, methods=[method], response_model=None)
    return Guard(app, server.settings, server.metrics)


async def _refuse(request: Request, error: Exception) -> Response:
    """What goes wrong, as the official client reads it."""
    if isinstance(error, ApiError):
        return error.response()
    if isinstance(error, ClientDisconnect):
        return Response(status_code=LEFT)
    if not isinstance(error, HTTPException):  # a defect, which goes on to the guard's log
        return internal().response()
    if error.status_code == 404:
        return ApiError(404, f"There is no {request.url.path[:200]!r} here: see /openapi.json.").response()
    if error.status_code == 405:
        told = f"{request.method} is not allowed here: see /openapi.json."
        return ApiError(405, told, headers=error.headers).response()
    return ApiError(error.status_code, sentence(str(error.detail)), headers=error.headers).response()
