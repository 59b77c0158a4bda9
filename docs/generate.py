"""The pages that are made from the code: docs/reference/ from docstrings, docs/guide/command-line.md from the options.

    python docs/generate.py

`make docs` runs it before it builds. What it writes is not committed.
"""

import ast
from pathlib import Path

import sparse_context

DOCS = Path(__file__).resolve().parent
PACKAGE = Path(sparse_context.__file__).parent
COMMAND = "sparse-context"

PAGES = {
    "apply": ("Apply and remove", ("sparsify",)),
    "selection": ("Configuration and selection", ("config", "selection")),
    "selectors": ("Selectors", ("selectors",)),
    "tokens": ("Tokens and budgets", ("tokens", "budget", "merge")),
    "overviews": ("Overviews", ("overview", "trained")),
    "cache": ("Reference cache", ("cache",)),
    "preview": ("Drawing what was kept", ("preview",)),
    "generate": ("Loading and generating", ("pipelines",)),
    "samples": ("Samples", ("samples",)),
    "training": ("Training", ("training",)),
    "evaluation": ("Evaluation", ("evaluation",)),
    "batch": ("Batches", ("batch",)),
    "benchmark": ("Benchmark", ("bench",)),
}
"""Page -> its title and the modules or folders that it shows."""


def modules(name: str) -> list[str]:
    """The dotted names of a module, or of all public modules of a folder that hold more than a docstring.

    Raises ValueError where there is neither.
    """
    if (PACKAGE / f"{name}.py").is_file():
        return [f"sparse_context.{name}"]
    if not (PACKAGE / name).is_dir():
        raise ValueError(f"PAGES names {name!r}, which sparse_context does not have: list what is there.")
    files = sorted(path for path in (PACKAGE / name).glob("*.py") if path.stem != "__main__")
    dotted = [f"sparse_context.{name}" + ("" if path.stem == "__init__" else f".{path.stem}") for path in files]
    return [each for each, path in zip(dotted, files, strict=True) if _has_names(path)]


def _has_names(path: Path) -> bool:
    lines = path.read_text().splitlines()
    return any(line.startswith(("def ", "class ")) and not line.split()[1].startswith("_") for line in lines)


def public_names() -> dict[str, tuple[str, str]]:
    """Every top-level name of the modules on these pages -> its page and the first line of its docstring."""
    found: dict[str, tuple[str, str]] = {}
    for page, (_, names) in PAGES.items():
        for module in (each for name in names for each in modules(name)):
            path = PACKAGE.joinpath(*module.split(".")[1:])
            tree = ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())
            for node in tree.body:
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                    line = (ast.get_docstring(node) or "").split("\n")[0]
                    found.setdefault(node.name, (page, line))
                elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                    for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                        if isinstance(target, ast.Name):
                            found.setdefault(target.id, (page, ""))
    return found


def write_reference(folder: Path = DOCS / "reference") -> None:
    """One page a subject, which mkdocstrings fills, and an index of the public names. Nothing heavy is imported."""
    folder.mkdir(parents=True, exist_ok=True)
    for page, (title, names) in PAGES.items():
        found = [module for name in names for module in modules(name)]
        parts = [f"## `{module}`\n\n::: {module}\n    options:\n      heading_level: 3" for module in found]
        (folder / f"{page}.md").write_text(f"# {title}\n\n" + "\n\n".join(parts) + "\n")
    known = public_names()
    rows = []
    for name in sparse_context.__all__:
        page, line = known.get(name, ("", ""))
        rows.append(f"| [`{name}`]({page}.md) | {_cell(line)} |" if page else f"| `{name}` | |")
    head = (
        "# Reference\n\nThese names are the public API: `from sparse_context import ...`. The other pages of this "
        "section also document modules that may change between releases.\n\n| name | |\n| --- | --- |\n"
    )
    (folder / "index.md").write_text(head + "\n".join(rows) + "\n")


def write_command_line(path: Path = DOCS / "guide" / "command-line.md") -> None:
    """Every command with its options."""
    from typer.main import get_command

    from sparse_context.cli import app

    group = get_command(app)
    parts = [
        "# Command line",
        f"`{COMMAND} COMMAND --help` prints the same. Bad input ends in one sentence on stderr and exit code 2, and "
        "nothing is written. Options that can be repeated say so.",
    ]
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        rows = []
        arguments = []
        for parameter in command.params:
            if parameter.name == "help":
                continue
            if parameter.param_type_name == "argument":
                arguments.append((parameter.name or "").upper())
                shown = f"`{arguments[-1]}`"
            else:
                shown = ", ".join(f"`{option}`" for option in parameter.opts)
            rows.append(f"| {shown} | {_default(parameter)} | {_cell(getattr(parameter, 'help', None) or '')} |")
        usage = " ".join([COMMAND, name, *(f"{each}..." for each in arguments), "[OPTIONS]"])
        text = " ".join((command.help or "").split())
        parts.append(f"## {name}\n\n{text}\n\n```sh\n{usage}\n```")
        parts.append("| option | default | |\n| --- | --- | --- |\n" + "\n".join(rows))
    path.write_text("\n\n".join(parts) + "\n")


def _default(parameter) -> str:
    if parameter.required:
        return "required"
    shown = getattr(parameter, "show_default", None)
    if isinstance(shown, str):
        return _cell(shown)
    value = parameter.default
    return "" if value is None or value is False or value == () else f"`{value}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    write_reference()
    write_command_line()
