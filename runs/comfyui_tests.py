"""The record of a run of the tests of the ComfyUI nodes on a real core, with nothing skipped.

    COMFYUI_DIR=/path/to/ComfyUI COMFY_CLI=/path/to/comfy python runs/comfyui_tests.py

This interpreter has what the core's requirements ask for, and what the tests need. COMFY_CLI is the command of
comfy-cli, which has an environment of its own. Nothing is written where a test fails or is skipped.
"""

import argparse
import importlib.metadata
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from tables import draw, read, table

from sparse_context.result import checkout, write_result

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("comfyui-frontend-package", "torch", "playwright")


def comfyui_tests() -> str:
    """How many tests of each file passed, and on what."""
    figures = read("comfyui_tests")["figures"]
    rows = [[f"`{file}`", str(count)] for file, count in figures["passed"].items()]
    core, front_end = figures["core"]["version"], figures["versions"]["comfyui-frontend-package"]
    on = f"ComfyUI {core}, front end {front_end}; {figures['skipped']} skipped."
    return f"{table(['file', 'tests passed'], rows)}\n\n{on}"


TABLES = {
    "comfyui_tests": comfyui_tests,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="The record of the nodes' tests on a real ComfyUI core.")
    parser.add_argument("--table", action="store_true", help="only draw the tables of results/ again, from the JSON")
    if parser.parse_args().table:
        return draw(TABLES)
    checkout()
    core = Path(os.environ["COMFYUI_DIR"])
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "tests/comfyui", f"--junitxml={report}"]
        subprocess.run(command, cwd=ROOT)
        cases = [*ElementTree.parse(report).iter("testcase")]
    bad = [case.get("name") for case in cases if any(child.tag in ("failure", "error", "skipped") for child in case)]
    if bad or not cases:
        sys.exit(f"{len(bad)} tests failed or were skipped, so nothing is recorded: {', '.join(map(str, bad[:5]))}")
    passed = Counter((case.get("classname") or "").rpartition(".")[2] for case in cases)
    version = (core / "comfyui_version.py").read_text(encoding="utf-8").split('"')[-2]
    head = ["git", "-C", core, "rev-parse", "HEAD"]
    commit = subprocess.run(head, capture_output=True, text=True, encoding="utf-8").stdout.strip()
    figures = {
        "core": {"version": version, "commit": commit},
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
        "passed": {f"tests/comfyui/{name}.py": count for name, count in sorted(passed.items())},
        "skipped": 0,
    }
    write_result(ROOT / "results" / "comfyui_tests.json", "comfyui_tests", {}, figures)
    draw(TABLES)


if __name__ == "__main__":
    main()
