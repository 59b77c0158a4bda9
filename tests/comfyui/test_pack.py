"""The pack as ComfyUI, its registry and its users find it."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from comfyui_core import PACK, ROOT
from comfyui_workflows import API, UI, WORKFLOWS
from hatchling.builders.wheel import WheelBuilder
from sparse_context_nodes import WEB_DIRECTORY
from sparse_context_nodes.families import FAMILIES
from sparse_context_nodes.words import OVERVIEWS, SELECTORS, TASKS, TIPS
from test_layers import BASE, ROOMS, imported

import sparse_context
from sparse_context import config
from sparse_context.families.flux2 import drop as flux2
from sparse_context.families.kontext import drop as kontext
from sparse_context.families.qwen import drop as qwen
from sparse_context.selectors import registry

PROJECT = tomllib.loads((PACK / "pyproject.toml").read_text(encoding="utf-8"))
HELP = PACK / WEB_DIRECTORY / "docs"


# What it is built on --------------------------------------------------------------------------------------------------


def test_the_nodes_import_only_the_base_layer():
    base = set().union(*(ROOMS[room] for room in BASE))
    for file in PACK.glob("*.py"):
        for name in imported("nodes", file.read_text(encoding="utf-8"), is_package=False):
            top, _, rest = name.partition(".")
            if top != "sparse_context" or rest == "__version__" or file.name == "__init__.py":
                continue
            module = rest.split(".")[0]
            if module.isidentifier() and (PACK / f"{module}.py").exists():  # a file beside it, relatively
                continue
            home = sparse_context._HOME.get(rest, rest).split(".")[0]
            assert home in base, f"{file.name} imports {name}"


def test_nothing_of_comfyui_is_imported_but_by_the_nodes():
    heavy = {"comfy", "comfy_api", "folder_paths", "server", "nodes"}
    for file in PACK.glob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        tops = {
            alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
        }
        tops |= {
            (node.module or "").split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and not node.level
        }
        assert file.name == "nodes.py" or not tops & heavy, file.name


def test_the_options_are_those_of_the_package():
    assert set(SELECTORS) == {"auto", *registry.SELECTORS} - {"mask"}
    assert set(TASKS) == set(config.TASKS)
    assert {int(each) for each in OVERVIEWS if each.isdigit()} == {2, 4, 8, 16}


def test_overviews_lie_where_weights_were_trained_to_find_them():
    assert (FAMILIES["flux2"].mark, FAMILIES["flux"].mark) == (flux2.MARK[1], kontext.MARK[1])
    assert (flux2.MARK[0], kontext.MARK[0]) == (0, 0)
    assert FAMILIES["qwen_image"].mark == qwen.APART


# What it says ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("node", TIPS)
def test_every_node_has_a_help_page_that_names_its_inputs(node):
    page = (HELP / f"{node}.md").read_text(encoding="utf-8")
    for name in TIPS[node]:
        if name != "description" and not name.startswith("out_"):
            assert f"**{name.rstrip('s') if name in ('images', 'masks') else name}" in page, name


def test_tips_are_sentences():
    for node, tips in TIPS.items():
        for name, tip in tips.items():
            assert tip[0].isupper() or re.match(r"[a-z]+( here)?: ", tip), (node, name)
            assert tip.endswith("."), (node, name)


def test_requirements_are_those_of_the_project():
    lines = (PACK / "requirements.txt").read_text(encoding="utf-8").split()
    assert lines == PROJECT["project"]["dependencies"] == ["sparse-context>=0.1"]


def test_the_licence_is_the_projects():
    assert (PACK / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


# Installing it --------------------------------------------------------------------------------------------------------

CORE = {
    "numpy": "1.25.0",
    "pillow": "10.1.0",
    "safetensors": "0.4.2",
    "torch": "2.6.0",
    "transformers": "4.50.3",
    "opencv-python": "4.9.0.80",
}
"""An environment as a core's requirements make it, at their lower bounds, and with the OpenCV of some other pack."""


def make_installed(folder: Path, packages: dict[str, str]) -> None:
    """What pip knows of packages that are installed: their names and versions."""
    for name, version in packages.items():
        info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")


def make_wheel(folder: Path) -> None:
    """The library's wheel, as far as pip looks before it installs: what it requires."""
    wheel, folder = WheelBuilder(str(ROOT)), folder / "wheels"
    folder.mkdir()
    info = f"sparse_context-{sparse_context.__version__}.dist-info"
    with zipfile.ZipFile(folder / f"sparse_context-{sparse_context.__version__}-py3-none-any.whl", "w") as file:
        file.writestr(f"{info}/METADATA", wheel.config.core_metadata_constructor(wheel.metadata))
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")


def installed_by_pip(tmp_path: Path, packages: dict[str, str]) -> tuple[set[str], str]:
    """What pip would install of the requirements of the nodes beside these packages, offline, and what it says."""
    venv.create(tmp_path / "core", with_pip=False)
    python = tmp_path / "core" / ("Scripts" if os.name == "nt" else "bin") / "python"
    site = subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True)
    make_installed(Path(site.strip()), packages)
    make_wheel(tmp_path)
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--dry-run", "--no-index", "--report", "-"]
    pip += ["--find-links", tmp_path / "wheels", "--quiet", "--disable-pip-version-check"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [*map(str, pip), "-r", str(PACK / "requirements.txt")],
        env=environment | {"PIP_CONFIG_FILE": os.devnull},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    report = json.loads(done.stdout) if done.returncode == 0 else {"install": []}
    return {each["metadata"]["name"] for each in report["install"]}, done.stderr


def test_installing_it_moves_nothing(tmp_path):
    assert installed_by_pip(tmp_path, CORE) == ({"sparse-context"}, "")


def test_that_test_sees_what_would_move(tmp_path):
    """A NumPy that is too old would have to be replaced, which offline cannot be."""
    moved, said = installed_by_pip(tmp_path, CORE | {"numpy": "1.24.0"})
    assert moved == set()
    assert "numpy>=1.25" in said


# Workflows ------------------------------------------------------------------------------------------------------------


def test_there_are_workflows_for_every_model():
    titles = " ".join(WORKFLOWS)
    for part in ("klein 4B - one", "klein 4B - two", "klein 4B - four", "klein 9B - one", "klein 9B - two"):
        assert part in titles
    for part in ("klein 9B - four", "klein 9B KV", "Kontext", "Qwen-Image-Edit"):
        assert part in titles


@pytest.mark.parametrize("title", WORKFLOWS)
def test_a_workflow_is_the_same_graph_in_both_formats(title):
    built = WORKFLOWS[title]().nodes
    assert json.loads((API / f"{title}.json").read_text(encoding="utf-8")) == built
    drawn = json.loads((UI / f"{title}.json").read_text(encoding="utf-8"))
    assert {str(node["id"]): node["type"] for node in drawn["nodes"]} == {
        number: node["class_type"] for number, node in built.items()
    }
    links = {each[0]: each for each in drawn["links"]}
    linked = {
        (str(node["id"]), slot["name"]): [str(links[slot["link"]][1]), links[slot["link"]][2]]
        for node in drawn["nodes"]
        for slot in node.get("inputs", [])
        if slot.get("link") is not None
    }
    assert linked == {
        (number, name): value
        for number, node in built.items()
        for name, value in node["inputs"].items()
        if isinstance(value, list)
    }
    for node in drawn["nodes"]:
        widgets = built[str(node["id"])]["inputs"]
        for name, value in node.get("widgets_values_named", {}).items():
            assert widgets.get(name, value) == value or isinstance(widgets[name], list), (node["type"], name)


@pytest.mark.parametrize("title", WORKFLOWS)
def test_a_workflow_has_a_thumbnail(title):
    from PIL import Image

    with Image.open(UI / f"{title}.jpg") as picture:
        assert picture.format == "JPEG"
        assert picture.width >= 320
    assert (UI / f"{title}.jpg").stat().st_size < 60_000


def test_no_other_files_lie_among_the_workflows():
    assert {file.name for file in API.iterdir()} == {f"{title}.json" for title in WORKFLOWS}
    assert {file.stem for file in UI.iterdir()} == set(WORKFLOWS)


# The registry's own checks --------------------------------------------------------------------------------------------


@pytest.fixture
def comfy():
    program = shutil.which("comfy") or os.environ.get("COMFY_CLI")
    if program is None:
        pytest.skip(
            "comfy-cli is not installed: pip install comfy-cli into an environment of its own, and set COMFY_CLI"
        )

    def run(folder, *arguments):
        return subprocess.run(
            [program, "--skip-prompt", "node", *arguments],
            cwd=folder,
            capture_output=True,
            text=True,
            encoding="utf-8",
            env={**os.environ, "DO_NOT_TRACK": "1"},
        )

    return run


@pytest.fixture
def copy(tmp_path):
    """The pack as it is committed, in a repository of its own, as the registry's tool reads it."""
    shutil.copytree(PACK, tmp_path / "pack", ignore=shutil.ignore_patterns("__pycache__"))
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@localhost"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "pack"]):
        subprocess.run([*git, *command], cwd=tmp_path / "pack", check=True, capture_output=True)
    return tmp_path / "pack"


def test_the_registry_finds_no_fault(comfy, copy):
    done = comfy(copy, "validate")
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "All validation checks passed" in said and "Warning" not in said, said


def test_the_registry_packs_what_comfyui_needs(comfy, copy):
    done = comfy(copy, "pack")
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = copy.glob("*.zip")
    with zipfile.ZipFile(archive) as packed:
        names = set(packed.namelist())
    assert {"__init__.py", "nodes.py", "pyproject.toml", "requirements.txt", "LICENSE", "README.md"} <= names
    assert {f"web/docs/{node}.md" for node in TIPS} <= names
    assert {f"example_workflows/{title}.json" for title in WORKFLOWS} <= names
    assert not {name for name in names if "__pycache__" in name or name.startswith("api_workflows")}
