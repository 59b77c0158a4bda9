"""A real ComfyUI server with the nodes, and tiny models in the place of real ones: for tests, pictures and by hand.

    COMFYUI_DIR=/path/to/ComfyUI python runs/comfyui_server.py FOLDER    # until it is interrupted

Open the address that it prints. FOLDER gets what the server writes.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from app_browser import free_port
from comfyui_core import PACK, ROOT
from PIL import Image

PATIENCE = 900  # seconds until the server answers, or a graph has run: a busy machine is no error
FILES = {
    "diffusion_models": (
        "flux-2-klein-4b-fp8.safetensors",
        "flux-2-klein-9b-fp8.safetensors",
        "flux-2-klein-9b-kv-fp8.safetensors",
        "flux1-dev-kontext_fp8_scaled.safetensors",
        "qwen_image_edit_2511_fp8mixed.safetensors",
    ),
    "text_encoders": (
        "qwen_3_4b.safetensors",
        "qwen_3_8b_fp8mixed.safetensors",
        "clip_l.safetensors",
        "t5xxl_fp8_e4m3fn_scaled.safetensors",
        "qwen_2.5_vl_7b_fp8_scaled.safetensors",
    ),
    "checkpoints": ("sam3.1_multiplex_fp16.safetensors",),
    "vae": ("flux2-vae.safetensors", "ae.safetensors", "qwen_image_vae.safetensors"),
}
"""Names of model files, by their folder: empty files, which only stand in the lists of loaders."""


def lay_out(folder: Path, pictures: dict[str, Image.Image]) -> None:
    """What a server finds in its base directory: the nodes, the tiny models and input pictures."""
    (folder / "custom_nodes").mkdir(parents=True, exist_ok=True)
    for name, pack in (("sparse-context-nodes", PACK), ("tiny", ROOT / "runs" / "comfyui_tiny")):
        link = folder / "custom_nodes" / name
        if not link.exists():
            link.symlink_to(pack, target_is_directory=True)
    for kind, names in FILES.items():
        (folder / "models" / kind).mkdir(parents=True, exist_ok=True)
        for name in names:
            (folder / "models" / kind / name).touch()
    (folder / "input").mkdir(exist_ok=True)
    for name, picture in pictures.items():
        picture.save(folder / "input" / name)


@contextmanager
def running_server(folder: Path, pictures: dict[str, Image.Image]) -> Iterator[str]:
    """The server, at the address that this yields, until the block ends; `folder` gets `log.txt`.

    Raises RuntimeError with what it printed where it does not start.
    """
    lay_out(folder, pictures)
    port, log = free_port(), folder / "log.txt"
    options = ["--cpu", "--listen", "127.0.0.1", "--port", port, "--base-directory", folder, "--disable-api-nodes"]
    options += ["--database-url", "sqlite:///:memory:", "--disable-all-custom-nodes", "--whitelist-custom-nodes"]
    options += ["sparse-context-nodes", "tiny"]
    main = Path(os.environ["COMFYUI_DIR"]) / "main.py"
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with log.open("w", encoding="utf-8") as file:
        server = subprocess.Popen(
            [sys.executable, str(main), *map(str, options)],
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=main.parent,
            env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
        )
    address, end = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE
    try:
        while True:
            try:
                fetch(f"{address}/system_stats")
                break
            except (urllib.error.URLError, ConnectionError):
                if server.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"The server does not start: {log.read_text(encoding='utf-8')}") from None
                time.sleep(0.5)
        yield address
    finally:
        if server.poll() is None:
            server.send_signal(signal.SIGTERM)
        server.wait()


def fetch(url: str, data: Any = None) -> Any:
    """The JSON that an address answers, to JSON if there is any to send. Raises HTTPError."""
    body = None if data is None else json.dumps(data).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        return json.loads(answer.read() or "null")


def run_graph(address: str, graph: dict[str, Any]) -> dict[str, Any]:
    """Queue a graph in the API's format and wait for it: its entry in the history."""
    number = fetch(f"{address}/prompt", {"prompt": graph})["prompt_id"]
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        history = fetch(f"{address}/history/{number}")
        if number in history and history[number]["status"]["completed"] is not None:
            return history[number]
        time.sleep(0.2)
    raise RuntimeError(f"The graph has not ended in {PATIENCE} s.")


def example_pictures() -> dict[str, Image.Image]:
    """References of the embedded model's examples, four times as large; and "example.png", which every ComfyUI has."""
    folder = ROOT / "sparse_context" / "embedded" / "examples"
    pictures: dict[str, Image.Image] = {}
    for i in range(1, 5):
        picture = Image.open(folder / f"quarters-{i}.webp").convert("RGB")
        pictures[f"reference-{i}.png"] = picture.resize((512, 512), Image.Resampling.LANCZOS)
    return {**pictures, "example.png": pictures["reference-1.png"]}


def main() -> None:
    parser = argparse.ArgumentParser(description="A real ComfyUI server with the nodes and tiny models.")
    parser.add_argument("folder", type=Path)
    with running_server(parser.parse_args().folder, example_pictures()) as address:
        print(address, flush=True)
        signal.pause()


if __name__ == "__main__":
    main()
