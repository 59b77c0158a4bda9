"""The package comes in two layers, and what is missing of either is said in one sentence.

`pip install sparse-context` is the idea: NumPy, Pillow and safetensors. It takes PyTorch and OpenCV as it finds them,
since any build of either will do, and another one beside it would break somebody's environment: opencv-python,
opencv-python-headless and opencv-contrib-python all install the same `cv2`. Pipelines, the command and training come
with `pip install 'sparse-context[diffusers]'`.
"""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager

DIFFUSERS = "pip install 'sparse-context[diffusers]'"
RAY = "pip install 'sparse-context[ray]'"
SERVER = "pip install 'sparse-context[server]'"

INSTALL: dict[str, str] = {
    "torch": "pip install torch",
    "cv2": "pip install opencv-python-headless",
    "ray": RAY,
    **dict.fromkeys(("fastapi", "prometheus_client", "python_multipart", "starlette", "uvicorn"), SERVER),
    "gradio": "pip install 'sparse-context[app]'",
    "onnxruntime": "pip install 'sparse-context[onnx]'",
    **dict.fromkeys(("accelerate", "diffusers", "filelock", "peft", "tqdm", "transformers", "typer"), DIFFUSERS),
}
"""By the name that is imported, the command that brings it."""


class MissingPackageError(ImportError):
    """A package is asked for that the base layer can do without. The message says how to install it."""

    def __init__(self, package: str) -> None:
        super().__init__(f"{package} is not installed: {INSTALL[package]}.", name=package)


def require(package: str) -> None:
    """Raise `MissingPackageError` unless `package`, one of `INSTALL`, can be imported. It is not imported here."""
    try:
        found = package in sys.modules or importlib.util.find_spec(package) is not None
    except ImportError:  # an importer that blocks it
        found = False
    if not found:
        raise MissingPackageError(package)


@contextmanager
def explain_missing_packages() -> Iterator[None]:
    """Imports within that fail because one of `INSTALL` is not there raise `MissingPackageError` instead."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in INSTALL or package in sys.modules:  # a module that an older release of it has not
            raise
        raise MissingPackageError(package) from error
