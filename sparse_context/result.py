"""Result: the one JSON record behind every published figure, shared by evaluation, benchmark and `runs/`."""

import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from .images import save_text
from .selection import selection_version

CODE = (":/", ":(top,exclude)results", ":(top,exclude)docs")  # what runs write does not change what they measure


PACKAGES = ("torch", "diffusers", "transformers", "numpy", "opencv-python-headless")


def make_result(name: str, config: dict[str, Any], figures: dict[str, Any]) -> dict[str, Any]:
    """`figures` with what is needed to judge and to repeat them.

    Adds the versions (`selection_version` among them), the commit of the checkout that this package is in and whether
    its code was dirty (None outside of one), as they were when this module was imported, and the hardware with its load
    average over the last minute (None where the system keeps none, as Windows).
    """
    versions = {"python": platform.python_version(), "selection": selection_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "name": name,
        "config": config,
        "versions": versions,
        **CHECKOUT,
        "hardware": {"cpu": _cpu(), "cores": os.cpu_count(), "load": _load()},
        "figures": figures,
    }


def write_result(path: Path, name: str, config: dict[str, Any], figures: dict[str, Any]) -> dict[str, Any]:
    """Write `make_result` to `path` as JSON, whole or not at all, and return it."""
    result = make_result(name, config, figures)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_text(json.dumps(result, indent=2) + "\n", path)
    return result


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _checkout() -> dict[str, Any]:
    commit = _git("rev-parse", "HEAD") or None
    dirty = _git("status", "--porcelain", "--untracked-files=no", "--", *CODE)
    return {"commit": commit, "dirty": bool(dirty) if commit else None}


CHECKOUT = _checkout()  # now, for what is committed while a run goes on is not what ran


def _load() -> float | None:
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
