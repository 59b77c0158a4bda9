"""The address of the page, the folder of what is uploaded, and the end."""

import contextlib
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from ..pipelines.spec import ModelSpec, Request

STYLE = Path(__file__).with_name("style.css")
MOST_BYTES = "64mb"  # of one file that is uploaded
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(specs: Mapping[str, ModelSpec], start: Request, host: str, port: int) -> None:
    """Load the first model, and answer at http://host:port until Ctrl+C or a request to terminate.

    specs: the models that may be chosen, by their names on the page. start: what the page says at first, without
    references. Nothing is asked of another host; uploads are deleted once they are read, and their folder at the end.
    Raises ValueError, in one sentence, for an address that cannot be had, and what loading raises.
    """
    check_address(host, port)
    with tempfile.TemporaryDirectory(prefix="sparse-context-") as folder:
        # Read when Gradio is imported. Without the first it asks its makers' server for the newest version.
        os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_TEMP_DIR=folder)
        from .page import Page

        page = Page(specs, start)
        next(iter(page.engines.values())).warm_up()
        launch(page, host, port)
        print(f"Open http://{host}:{port} (Ctrl+C ends it)", flush=True)
        if host not in LOOPBACK:
            print("Whoever reaches this machine can use the app: keep it in a closed network.", flush=True)
        try:
            wait_for_the_end()
        finally:
            page.sessions.close_all()
            page.blocks.close(verbose=False)


def wait_for_the_end() -> None:
    """Until Ctrl+C, or SIGTERM where there is one."""
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    with contextlib.suppress(KeyboardInterrupt):
        while not ended.wait(1):  # Windows looks for Ctrl+C between waits
            pass


def launch(page, host: str, port: int) -> None:
    """Open the address of a page, in threads of Gradio's own."""
    import gradio as gr

    page.blocks.queue(max_size=64, api_open=False)
    page.blocks.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        run_history=False,
        enable_monitoring=False,
        footer_links=[],
        max_file_size=MOST_BYTES,
        state_session_capacity=64,
        theme=gr.themes.Default(primary_hue="red", font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        css_paths=[STYLE],
    )


def check_address(host: str, port: int) -> None:
    """Raise ValueError, in one sentence, where nothing can be opened at this address."""
    if not 1 <= port <= 65535:
        raise ValueError(f"port is {port}: pass a number from 1 to 65535.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with closing(socket.socket(family, kind, protocol)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ValueError(
            f"The address {host}:{port} cannot be had ({error.strerror or error}): name another host or port."
        ) from error
