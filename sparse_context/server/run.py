"""The application behind a port: uvicorn, its signals, its log."""

import asyncio
import json
import logging
import math
import socket
import sys
from collections.abc import Callable

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..pipelines.engine import Engine
from .app import Server, wrap
from .errors import ApiError
from .settings import Settings
from .worker import Worker

HEAD_SECONDS = 20.0
"""For so long the head of a request may take, and a connection on which none comes."""

READ_SECONDS = 60.0
"""For so long a client may leave an answer unread that does not fit into the buffers between."""

log = logging.getLogger("sparse_context.server")


class PatientProtocol(H11Protocol):
    """HTTP/1.1 that waits for slow clients, but not for ever, and says what is wrong as the rest does."""

    _head: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head, self._unread):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        self._unread = self.loop.call_later(READ_SECONDS, self.transport.abort)
        super().pause_writing()

    def resume_writing(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        body = json.dumps({"error": ApiError(400, msg, code="invalid_http").error}).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _watch(self) -> None:
        """Have the time run while no request is under way, from the first byte that belongs to none."""
        if self.cycle is not None and not self.cycle.response_complete:
            if self._head is not None:
                self._head.cancel()
                self._head = None
        elif self._head is None:
            self._head = self.loop.call_later(HEAD_SECONDS, self.transport.close)


def check_port(port: int) -> None:
    """Raise ValueError for a number that is no port, of which some systems make another one."""
    if not 0 <= port <= 65535:
        raise ValueError(f"port is {port}: pass a number from 0 to 65535.")


def listen(host: str, port: int) -> socket.socket:
    """A socket on this port (0: any that is free). Raises ValueError where there can be none."""
    check_port(port)
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"{host}:{port} cannot be listened on ({reason}): choose another --host or --port.") from None


def run(engine: Engine, settings: Settings, port: int = 8000, make_worker: Callable[..., Worker] = Worker) -> None:
    """Serve until a signal says to stop; what was begun by then is finished, within its deadline.

    make_worker: see `Server`. Raises ValueError for a port that is taken, and what loading the pipeline raises.
    """
    import python_multipart  # noqa: F401  # by which forms are read: better to miss it now

    server = Server(engine, settings, make_worker)
    sock = listen(settings.host, port)
    _start_log()
    behind = uvicorn_of(server)

    def give_up() -> None:
        behind.should_exit = True

    server.worker.on_failure = give_up
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    log.info("serving %s on http://%s:%d", settings.name, host, sock.getsockname()[1])
    behind.run(sockets=[sock])
    if server.worker.failure is not None:
        raise server.worker.failure


def uvicorn_of(server: Server) -> uvicorn.Server:
    """What serves the application, once it is run on a socket."""
    config = uvicorn.Config(
        wrap(server),
        loop="asyncio",
        http=PatientProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=math.ceil(server.settings.deadline + server.settings.upload_seconds),
    )
    return uvicorn.Server(config)


def _start_log() -> None:
    """One line a request on stderr, and nothing of what libraries say but their errors."""
    import diffusers.utils.logging
    import transformers.utils.logging

    logging.disable(logging.NOTSET)
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
