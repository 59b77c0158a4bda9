"""Result: the one JSON record behind every published figure, shared by evaluation, benchmark and `runs/`."""

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from .images import save_text
from .selection import selection_version

CODE = (":/", ":(top,exclude)results", ":(top,exclude)docs")  # what runs write does not change what they measure


PACKAGES = ("torch", "diffusers", "transformers", "numpy", "opencv-python-headless")


def make_result(name: str, config: Mapping[str, object], figures: Mapping[str, object]) -> dict[str, object]:
    """`figures` with what is needed to judge and to repeat them.

    Adds the versions (`selection_version` among them), the `checkout`, and the hardware with its load average over the
    last minute (None where the system keeps none, as Windows).
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
        **checkout(),
        "hardware": {"cpu": _cpu(), "cores": os.cpu_count(), "load": _load()},
        "figures": figures,
    }


@cache
def checkout() -> dict[str, str | bool | None]:
    """The commit of the checkout that this package is in, and whether its code is dirty; both None outside of one.

    Git is asked once. A run that takes a while calls this when it starts, for what is committed meanwhile is not what
    runs.
    """
    commit = _git("rev-parse", "HEAD") or None
    dirty = _git("status", "--porcelain", "--untracked-files=no", "--", *CODE)
    return {"commit": commit, "dirty": bool(dirty) if commit else None}


def write_result(
    path: Path, name: str, config: Mapping[str, object], figures: Mapping[str, object]
) -> dict[str, object]:
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
