"""Who may import whom, what each layer of the package needs, and what lies in the wheel."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

import sparse_context
from sparse_context.layers import DIFFUSERS, INSTALL

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sparse_context"

ROOMS = {
    "layers": {"layers"},
    "the idea": {
        "tokens",
        "overview",
        "large",
        "trained",
        "budget",
        "merge",
        "config",
        "phrases",
        "plan",
        "selection",
        "selectors",
    },
    "pictures and records": {"images", "preview", "samples", "result", "cache", "texts"},
    "what is installed": {"context"},
    "families": {"families"},
    "apply, remove, ask": {"sparsify"},
    "pipelines": {"pipelines"},
    "the embedded model": {"embedded"},
    "work": {"training", "evaluation", "bench", "batch"},
    "faces": {"cli", "app", "server"},
    "entrance": {"__init__", "__main__"},
}
"""Every module below sparse_context is in one room, by the first part of its name. It may import from its own room and
from those before it."""

BASE = ("layers", "the idea", "pictures and records")
BASE_MAY_IMPORT = {"PIL", "cv2", "numpy", "safetensors"} | sys.stdlib_module_names
WITH_TORCH = {
    "tokens",
    "overview",
    "large",
    "selectors.saliency",
    "selectors.finders",
    "cache",
}  # the others do without
WITHIN_FUNCTIONS = {
    ("samples.progress", "tqdm"),
    ("samples.table", "datasets"),
    ("samples.ai_toolkit", "yaml"),
    ("samples.archives", "fsspec"),
    ("selectors.finders", "huggingface_hub"),
    ("selectors.finders", "transformers"),
    ("selectors.matting", "onnxruntime"),
}


def read_modules(folder: Path = PACKAGE) -> dict[str, str]:
    """The source of each module by its dotted name below the package; `families` is families/__init__.py."""
    modules = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        name = ".".join(parts if len(parts) == 1 or parts[-1] != "__init__" else parts[:-1])
        modules[name] = path.read_text(encoding="utf-8")
    return modules


def imported(module: str, source: str, is_package: bool) -> set[str]:
    """Dotted names of all that a module imports: at its top, inside functions, and for type checkers alone."""
    place = ["sparse_context", *([] if module in ("__init__", "__main__") else module.split("."))]
    package = place if is_package or module in ("__init__", "__main__") else place[:-1]
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def arrows(modules: Mapping[str, str]) -> dict[str, set[str]]:
    """Each module -> those of the package that it imports by name."""
    graph: dict[str, set[str]] = {}
    for module, source in modules.items():
        graph[module] = set()
        for name in imported(module, source, is_package=any(other.startswith(f"{module}.") for other in modules)):
            top, _, rest = name.partition(".")
            if top != "sparse_context" or rest == "__version__":  # which is there before anything is imported
                continue
            home = f"{sparse_context._HOME[rest]}.{rest}" if rest in sparse_context._HOME else rest
            while home and home not in modules:
                home = home.rpartition(".")[0]
            graph[module].add(home or "__init__")
        graph[module].discard(module)
    return graph


def with_packages(graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """`graph` with the package around a module, which Python imports before it, for all that are not within it."""
    found = {}
    for module, others in graph.items():
        ways = {other.rpartition(".")[0] for other in others} & set(graph)
        found[module] = others | {way for way in ways if not f"{module}.".startswith(f"{way}.")}
    return found


def room_of(module: str) -> int:
    """The place of a module's room. Raises LookupError for a module without a room, or with several."""
    rooms = [i for i, modules in enumerate(ROOMS.values()) if module.split(".")[0] in modules]
    if len(rooms) != 1:
        raise LookupError(f"{module} is in {len(rooms)} rooms: give it a line in ROOMS")
    return rooms[0]


def back_arrows(graph: Mapping[str, set[str]]) -> set[tuple[str, str]]:
    return {(module, other) for module, others in graph.items() for other in others if room_of(other) > room_of(module)}


def find_circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Modules that import one another in a ring; empty where there is none."""
    done: set[str] = set()

    def follow(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module not in done:
            for other in sorted(graph[module]):
                if circle := follow(other, [*path, module]):
                    return circle
            done.add(module)
        return []

    return next((circle for module in sorted(graph) if (circle := follow(module, []))), [])


def outside(module: str, source: str) -> set[str]:
    """Packages that a module of the base layer imports and may not."""
    tops = {name.partition(".")[0] for name in imported(module, source, is_package=False)} - {"sparse_context"}
    allowed = BASE_MAY_IMPORT | ({"torch"} if module in WITH_TORCH else set())
    return {top for top in tops - allowed if (module, top) not in WITHIN_FUNCTIONS}


MODULES = read_modules()
GRAPH = arrows(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_every_module_is_in_one_room_and_imports_downwards(module):
    upwards = back_arrows({module: GRAPH[module]})
    assert upwards == set()
    if module.split(".")[0] in set().union(*(ROOMS[room] for room in BASE)):
        assert outside(module, MODULES[module]) == set()


def test_no_modules_import_one_another_in_a_ring():
    assert find_circle(with_packages(GRAPH)) == []


def test_no_room_stands_empty():
    assert set().union(*ROOMS.values()) == {module.split(".")[0] for module in MODULES}


def test_the_rules_fail_where_they_should():
    with pytest.raises(LookupError, match="^helpers is in 0 rooms: give it a line in ROOMS$"):
        back_arrows(arrows({**MODULES, "helpers": "import math\nfrom .tokens import ReferenceTokens"}))
    with pytest.raises(LookupError, match=r"^helpers\.files is in 0 rooms"):
        back_arrows(arrows({**MODULES, "helpers": "", "helpers.files": "", "sparsify": "from .helpers import files"}))

    def upwards(module, source):
        return back_arrows(arrows({**MODULES, module: source}))

    assert upwards("budget", "from sparse_context.sparsify import apply_sparse_context") == {("budget", "sparsify")}
    assert upwards("budget", "def f():\n    from . import sparsify") == {("budget", "sparsify")}
    assert upwards("budget", "from sparse_context import apply_sparse_context") == {("budget", "sparsify")}
    assert upwards("budget", "from sparse_context import anything") == {("budget", "__init__")}
    assert upwards("budget", "from .tokens import ReferenceTokens\nfrom . import selectors\nimport math") == set()
    assert upwards("families.modular", "from .. import training") == {("families.modular", "training")}
    assert upwards("families.host", "import sparse_context.cli") == {("families.host", "cli")}
    assert upwards("training.loop", "from .. import __version__, cli") == {("training.loop", "cli")}

    ring = arrows({**MODULES, "merge": "def f():\n    from .selection import Kept"})
    assert set(find_circle(ring)) == {"merge", "selection"}
    package = arrows({**MODULES, "selectors": "from ..budget import SHARES"})  # of which `budget` imports a module
    assert find_circle(package) == []
    assert set(find_circle(with_packages(package))) == {"budget", "selectors"}

    assert outside("selectors.classical", "import diffusers.hooks") == {"diffusers"}
    assert outside("selectors.classical", "def f():\n    from torch import nn") == {"torch"}
    assert outside("tokens", "import torch\nimport tqdm") == {"tqdm"}


# What each layer needs ------------------------------------------------------------------------------------------------

BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {packages}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
"""

SECOND_LAYER = sorted(package for package, how in INSTALL.items() if how == DIFFUSERS)


def run_without(packages, code):
    """A Python process in which `packages` cannot be imported."""
    return subprocess.run(
        [sys.executable, "-c", BLOCKED.format(packages=set(packages)) + code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )


def test_the_package_imports_nothing_heavy_until_a_name_is_used():
    command = (
        "import sparse_context, sys; "
        "print(sorted({'torch', 'diffusers', 'transformers', 'cv2', 'numpy'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_second_layer_is_what_the_extra_adds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {requirement.split(">=")[0] for requirement in project["optional-dependencies"]["diffusers"]}
    assert set(SECOND_LAYER) <= names
    for extra in ("evaluate", "mini", "train"):
        assert "sparse-context[diffusers]" in project["optional-dependencies"][extra]
    assert {"sparse-context[evaluate]", "sparse-context[train]"} <= set(project["optional-dependencies"]["test"])


def test_the_idea_selects_tokens_without_the_second_layer():
    base = sorted(module for module in MODULES if module.split(".")[0] in set().union(*(ROOMS[room] for room in BASE)))
    code = f"""
import importlib
import numpy as np
for module in {base}:
    importlib.import_module("sparse_context." + module)
import torch
from sparse_context import ReferenceTokens, SparseContextConfig, select_tokens
image = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
selection = select_tokens([image], [(8, 8)], SparseContextConfig(keep=0.25))
tokens = ReferenceTokens(torch.zeros(1, 64, 4), torch.zeros(64, 3)).keep(selection.index)
print(len(tokens), selection.references[0].selector)
"""
    done = run_without(SECOND_LAYER, code)
    assert done.stderr == ""
    assert done.stdout.split()[0] == "16"


def test_tokens_are_selected_without_torch():
    code = """
import numpy as np
from sparse_context import SparseContextConfig, select_tokens
image = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
for selector in ("edges", "contrast", "uniform"):
    print(select_tokens([image], [(8, 8)], SparseContextConfig(keep=0.25, selector=selector)).kept)
print(len(select_tokens([image], [(8, 8)], SparseContextConfig(keep=0.25, overview=4, task="global")).index))
try:
    select_tokens([image], [(8, 8)], SparseContextConfig(keep=0.25))
except ImportError as error:
    print(error)
"""
    done = run_without({"torch", *SECOND_LAYER}, code)
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["16", "16", "16", "12", "torch is not installed: pip install torch."]


NEEDED = "diffusers is not installed: pip install 'sparse-context[diffusers]'."


@pytest.mark.parametrize(
    ("packages", "call", "sentence"),
    [
        (SECOND_LAYER, "sparse_context.apply_sparse_context(object())", NEEDED),
        (SECOND_LAYER, "sparse_context.insert_sparse_context(object())", NEEDED),
        (["torch"], "sparse_context.ReferenceTokens", "torch is not installed: pip install torch."),
        (["cv2"], "sparse_context.choose_tokens", "cv2 is not installed: pip install opencv-python-headless."),
        (SECOND_LAYER, "samples.check_samples('README.md')", NEEDED.replace("diffusers is", "tqdm is")),
    ],
)
def test_a_function_without_its_layer_says_what_to_install(packages, call, sentence):
    code = f"""
import sparse_context
if "samples" in {call!r}:
    from sparse_context import samples
try:
    {call}
except ImportError as error:
    print(error)
"""
    done = run_without(packages, code)
    assert (done.stdout.strip(), done.stderr) == (sentence, "")


@pytest.mark.parametrize("packages", [SECOND_LAYER, ["diffusers"]], ids=["all", "diffusers"])
def test_a_command_without_its_layer_says_what_to_install(packages):
    code = """
sys.argv = ["sparse-context", "generate", "--prompt", "a cat", "--image", "docs/images/hero.webp", "--output", "no.png"]
from sparse_context.__main__ import main
main()
"""
    done = run_without(packages, code)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.endswith(" is not installed: pip install 'sparse-context[diffusers]'.\n")
    assert done.stderr.count("\n") == 1


# The wheel ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel() -> WheelBuilder:
    return WheelBuilder(str(ROOT))


def test_the_wheel_holds_the_package_and_its_weights_and_no_recipe(wheel):
    files = {Path(file.distribution_path).as_posix() for file in wheel.recurse_included_files()}
    assert {file.split("/")[0] for file in files} == {"sparse_context"}
    assert {f"sparse_context/{path.relative_to(PACKAGE).as_posix()}" for path in PACKAGE.rglob("*.py")} <= files
    assert "sparse_context/selectors/saliency.safetensors" in files
    assert any(file.startswith("sparse_context/embedded/weights/") for file in files)
    assert "sparse_context/embedded/overview.safetensors" in files


def test_installing_the_base_layer_moves_nothing(wheel):
    """What the wheel's METADATA requires, unless an extra is asked for: three packages that are everywhere, at bounds
    as old as what ComfyUI asks for itself (numpy>=1.25, safetensors>=0.4.2, any Pillow)."""
    lines = wheel.config.core_metadata_constructor(wheel.metadata).splitlines()
    requirements = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    assert sorted(line for line in requirements if "extra ==" not in line) == [
        "numpy>=1.25",
        "pillow>=10.1",
        "safetensors>=0.4.2",
    ]
