"""A real server in a thread, the official client before it, and ways to hold the pipeline."""

import base64
import contextlib
import http.client
import io
import threading
import time
from urllib.parse import urlsplit

import numpy as np
import openai
from PIL import Image

from sparse_context.pipelines import Engine
from sparse_context.server.app import Server
from sparse_context.server.run import listen, uvicorn_of
from sparse_context.server.settings import Settings

PATIENCE = 300.0
"""Seconds after which a test has failed: a busy machine is no error."""


class Service:
    """A server on a port of its own. It is ready when it is there."""

    def __init__(self, engine: Engine, **settings):
        settings = {"name": "tiny", "deadline": PATIENCE, "batch": 2, **settings}
        self.server = Server(engine, Settings(**settings))
        self.worker, self.metrics = self.server.worker, self.server.metrics
        self._socket = listen("127.0.0.1", 0)
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.uvicorn = uvicorn_of(self.server)
        self._clients = []
        self.thread = threading.Thread(target=self.uvicorn.run, kwargs={"sockets": [self._socket]}, daemon=True)
        self.thread.start()
        wait_for(lambda: self.worker.ready or self.worker.failure)

    def client(self, kind=openai.OpenAI, **options):
        options = {"max_retries": 0, "api_key": "none", "timeout": PATIENCE, **options}
        client = kind(base_url=f"{self.url}/v1", **options)
        if kind is openai.OpenAI:
            self._clients.append(client)
        return client

    def get(self, path, headers=None, method="GET", body=None):
        """Status, headers and body of a plain request."""
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=PATIENCE)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()

    def figure(self, name, **labels):
        """A figure of the metrics, 0.0 where nothing was counted yet."""
        return self.metrics._registry.get_sample_value(f"sparse_context_{name}", labels) or 0.0

    def stop(self):
        self.uvicorn.should_exit = True
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()
        for client in self._clients:  # not before: they may be waiting for an answer
            client.close()


def wait_for(condition, seconds=PATIENCE):
    """Look again and again until something holds; fails after a while."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)


class Hold:
    """Holds the pipeline before a forward of its transformer: `entered` is set there, and `let_go` ends it for good."""

    def __init__(self, pipe):
        self.forwards = 0
        self.entered = threading.Event()
        self._free = threading.Event()
        self._handle = pipe.transformer.register_forward_pre_hook(self._wait)

    def _wait(self, *_):
        self.forwards += 1
        self.entered.set()
        assert self._free.wait(PATIENCE)

    def let_go(self):
        self._free.set()

    def remove(self):
        self.let_go()
        self._handle.remove()


@contextlib.contextmanager
def held(pipe):
    hold = Hold(pipe)
    try:
        yield hold
    finally:
        hold.remove()


def pixels(seed=0, width=64, height=64):
    """Colourful noise in cells of 8 pixels, each of which is a token."""
    cells = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return cells.repeat(8, 0).repeat(8, 1)


def png(seed=0, width=64, height=64):
    return written(Image.fromarray(pixels(seed, width, height)))


def written(image, format="PNG", **options):
    """The bytes of a picture's file."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def opened(data):
    """The picture of an entry of an answer, or of an event."""
    return Image.open(io.BytesIO(base64.b64decode(data.b64_json)))


def multipart(fields, boundary="limit"):
    """A body of (name, value) or (name, bytes): its type, and its bytes."""
    parts = []
    for name, value in fields:
        file = '; filename="../../etc/passwd"' if isinstance(value, bytes) else ""
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'
        parts.append(head.encode() + (value if isinstance(value, bytes) else value.encode()) + b"\r\n")
    return f"multipart/form-data; boundary={boundary}", b"".join(parts) + f"--{boundary}--\r\n".encode()
