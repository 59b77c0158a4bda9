"""The address of the page, the folder of what is uploaded, and the end."""

import contextlib
import os
import signal
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..pipelines.spec import ModelSpec, Request

if TYPE_CHECKING:
    import gradio as gr

    from .page import Page

STYLE = Path(__file__).with_name("style.css")
MOST_BYTES = "64mb"  # of one file that is uploaded
MOST_WAITING = 64  # events of all pages
PATIENCE = 2  # seconds for open pages to hear that the app ends
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(specs: Mapping[str, ModelSpec], start: Request, host: str, port: int) -> None:
    """Load the first model, and answer at http://host:port until Ctrl+C or a request to terminate.

    specs: the models that may be chosen, by their names on the page. start: what the page says at first, without
    references. Nothing is asked of another host; uploads are deleted once they are read, and their folder at the end.
    Raises ValueError, in one sentence, for an address that cannot be had, and what loading raises.
    """
    with listen(host, port) as sock, tempfile.TemporaryDirectory(prefix="sparse-context-") as folder:
        # Read when Gradio is imported. Without the first it asks its makers' server for the newest version.
        os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_TEMP_DIR=folder)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the folder goes with either
        with contextlib.suppress(KeyboardInterrupt):
            from .page import Page

            page = Page(specs, start)
            next(iter(page.engines.values())).warm_up()
            run(page, sock, host)


def listen(host: str, port: int) -> socket.socket:
    """A socket at this address. Raises ValueError, in one sentence, where there can be none."""
    if not 1 <= port <= 65535:
        raise ValueError(f"port is {port}: pass a number from 1 to 65535.")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        reason = str(error.strerror or error).partition(" (while")[0]  # to which `create_server` adds the address
        raise ValueError(f"The app cannot use {host}:{port} ({reason}): pass another --host or --port.") from error


def run(page: "Page", sock: socket.socket, host: str) -> None:
    """Answer at a socket until a signal. Raises KeyboardInterrupt then, as uvicorn hands it on."""
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI

    page.blocks.queue(max_size=MOST_WAITING, api_open=False)
    page.blocks.state_session_capacity = MOST_WAITING
    # Not `launch`, which gives up where a busy machine takes some seconds for the first answer.
    app = gr.mount_gradio_app(
        FastAPI(openapi_url=None),
        page.blocks,
        path="",
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        run_history=False,
        enable_monitoring=False,
        footer_links=[],
        max_file_size=MOST_BYTES,
        theme=_theme(),
        css_paths=[STYLE],
    )

    class Server(uvicorn.Server):
        """Says where it answers, and ends what pages have begun before it waits for them."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            shown = f"[{host}]" if ":" in host else host
            print(f"Open http://{shown}:{sock.getsockname()[1]} (Ctrl+C ends it)", flush=True)
            if host not in LOOPBACK:
                print("Anyone who can reach this machine can use the app: keep it in a closed network.", flush=True)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            page.sessions.close_all()
            await super().shutdown(sockets)

    config = uvicorn.Config(
        app, log_level="critical", access_log=False, ws="none", timeout_graceful_shutdown=PATIENCE, server_header=False
    )
    Server(config).run(sockets=[sock])


def _theme() -> "gr.Theme":
    """Fonts that are there, and colours that can be read: 4.5:1 or more against what is behind them."""
    import gradio as gr

    theme = gr.themes.Default(primary_hue="red", font=["system-ui", "sans-serif"], font_mono=["monospace"])
    return theme.set(
        color_accent="*primary_600",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_border_color="*primary_600",
        body_text_color_subdued="*neutral_500",
        block_info_text_color="*neutral_500",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        checkbox_border_color="*neutral_500",
        checkbox_border_color_dark="*neutral_400",
    )
