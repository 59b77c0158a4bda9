"""Who may import whom: faces import work, work imports hosts, hosts import the idea, and never the other way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sparse_context"

IDEA = {"tokens", "selectors", "budget", "selection", "saliency", "contrast", "images", "result", "preview"}
HOSTS = {"sparsify", "context", "families", "cache"}
WORK = {"manifest", "lora", "generation", "training", "evaluation", "speed", "mini"}
FACES = {"cli", "app", "server"}

IDEA_MAY_IMPORT = {"numpy", "cv2", "PIL", "safetensors"} | sys.stdlib_module_names


def imports(source, package):
    """Dotted names of all that a module of `package` imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            # `from sparse_context import cli` imports a room by its name, `from numpy import array` does not.
            yield from (f"{base}.{alias.name}" for alias in node.names)


def forbidden(room, source, package="sparse_context"):
    """What a module of this room imports and may not."""
    found = set()
    for name in imports(source, package):
        top, _, rest = name.partition(".")
        if top == "sparse_context":
            other = rest.partition(".")[0]
            if room in IDEA:
                wrong = other not in IDEA
            elif room in HOSTS:
                wrong = other in WORK | FACES
            else:
                wrong = other in FACES and room not in FACES
        else:
            wrong = (
                room in IDEA and top not in IDEA_MAY_IMPORT and not (top == "torch" and room in {"tokens", "saliency"})
            )
        if wrong:
            found.add(name)
    return found


# __main__ and __init__ at the top belong to no room: the one starts the command, the other is the public list.
MODULES = sorted(
    path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem[0] != "_"
)


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_point_downwards(module):
    package = ".".join(["sparse_context", *module.parent.parts])
    room = module.parts[0].removesuffix(".py")
    assert forbidden(room, (PACKAGE / module).read_text(encoding="utf-8"), package) == set()


def test_the_rule_sees_every_way_to_import():
    assert forbidden("selectors", "import diffusers.hooks") == {"diffusers.hooks"}
    assert forbidden("selectors", "def f():\n    from torch import nn") == {"torch.nn"}
    assert forbidden("tokens", "import torch") == set()
    assert forbidden("budget", "from sparse_context.sparsify import apply_sparse_context") != set()
    assert forbidden("budget", "from .tokens import ReferenceTokens\nfrom . import selectors\nimport math") == set()
    assert forbidden("families", "from ..mini import model", "sparse_context.families") == {
        "sparse_context.embedded.model"
    }
    assert forbidden("families", "from sparse_context import training") == {"sparse_context.training"}
    assert forbidden("families", "from ..tokens import ReferenceTokens", "sparse_context.families") == set()
    assert forbidden("mini", "from .. import cli", "sparse_context.embedded") == {"sparse_context.cli"}
    assert forbidden("app", "from sparse_context.cli import main\nfrom sparse_context import mini") == set()


def test_the_package_imports_nothing_heavy_until_a_name_is_used():
    command = (
        "import sparse_context, sys; "
        "print(sorted({'torch', 'diffusers', 'transformers', 'cv2', 'numpy'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
