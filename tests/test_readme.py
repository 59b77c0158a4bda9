"""The documents: their tables are those of the results, their links lead somewhere, and the examples run."""

import ast
import importlib
import importlib.util
import json
import re
import runpy
import sys
import textwrap
import warnings
from pathlib import Path

import pytest

from sparse_context.families import FAMILIES
from sparse_context.samples import read_samples
from sparse_context.selection import selection_version

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
GENERATED = ("docs/reference/", "docs/guide/command-line.md")
UNRECORDED = "4c4dc696f009"  # what the results that do not say it were chosen by


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / name)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


@pytest.fixture(scope="module")
def include():
    return load_script("docs/include.py")


# Tables ---------------------------------------------------------------------------------------------------------------


def test_tables_are_those_of_the_results():
    tables = load_script("runs/tables.py")
    drawn = tables.all_tables()
    assert {path.stem for path in (ROOT / "results").glob("*.md")} == set(drawn)
    for name, make in drawn.items():
        assert (ROOT / "results" / f"{name}.md").read_text() == make() + "\n", name


def test_every_script_with_tables_is_known():
    tables = load_script("runs/tables.py")
    found = {path.stem for path in (ROOT / "runs").glob("*.py") if re.search(r"^TABLES = ", path.read_text(), re.M)}
    assert found == set(tables.RUNS)


def test_draw_writes_a_table_and_leaves_one_whose_result_is_missing(tmp_path, capsys):
    tables = load_script("runs/tables.py")

    def missing():
        return tables.read("no-such-result")

    tables.draw({"there": lambda: tables.table(["a", "b"], [["1", "2"]]), "gone": missing}, tmp_path)
    assert (tmp_path / "there.md").read_text() == "| a | b |\n| --- | --- |\n| 1 | 2 |\n"
    assert not (tmp_path / "gone.md").exists() and "no-such-result.json" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ({}, ""),
        ({"difference": -0.04, "difference_interval": None}, "-0.0"),
        ({"difference": 0.44, "difference_interval": [-0.2, 0.9]}, "+0.4 (-0.2 to +0.9)"),
    ],
)
def test_difference(entry, text):
    assert load_script("runs/tables.py").difference(entry) == text


def test_pages_hold_the_tables_that_they_include(include):
    assert len(include.pages()) > 20
    for page in include.pages():
        assert include.included(page.read_text()) == page.read_text(), f"{page}: run python docs/include.py"


def test_every_table_is_on_a_page(include):
    named = {name for page in include.pages() for name in re.findall(r"<!-- include (\S+) -->", page.read_text())}
    assert named == {f"results/{path.name}" for path in (ROOT / "results").glob("*.md")}


def test_include_replaces_what_stands_between_its_markers(include, tmp_path):
    (tmp_path / "a.md").write_text("| a |\n")
    page = "before\n\n<!-- include a.md -->\n\n| old |\n\n<!-- end -->\n\nafter\n"
    new = "before\n\n<!-- include a.md -->\n\n| a |\n\n<!-- end -->\n\nafter\n"
    assert include.included(page, tmp_path) == new == include.included(new, tmp_path)
    assert include.included("<!-- include a.md -->\n<!-- end -->\n", tmp_path).count("| a |") == 1


@pytest.mark.parametrize(
    ("page", "said"),
    [
        ("<!-- include gone.md -->\n<!-- end -->\n", "no such file"),
        ("<!-- include a.md -->\n", "no <!-- end -->"),
        ("<!-- include a.md -->\n<!-- include a.md -->\n<!-- end -->\n", "no <!-- end -->"),
    ],
)
def test_include_refuses_markers_that_do_not_fit(include, tmp_path, page, said):
    (tmp_path / "a.md").write_text("| a |\n")
    with pytest.raises(ValueError, match=said):
        include.included(page, tmp_path)


def test_results_were_chosen_by_the_selectors_of_today():
    """Where this fails, measure again, or say on the pages which figures are older and let them off here."""
    for path in (ROOT / "results").glob("*.json"):
        result = json.loads(path.read_text())
        assert result["versions"].get("selection", UNRECORDED) == selection_version(), path.name


# Pages ----------------------------------------------------------------------------------------------------------------


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
            path = (page.parent / target).resolve()
            if "://" in target or any(str(path.relative_to(ROOT)).startswith(each) for each in GENERATED):
                continue
            assert path.exists(), f"{page.relative_to(ROOT)} links to {target}"


def test_files_that_are_named_are_there():
    for page in PAGES:
        for name in re.findall(r"`((?:runs|docs|examples|tests|results)/[\w./-]+\.\w+)`", page.read_text()):
            assert "NAME" in name or (ROOT / name).exists(), f"{page.relative_to(ROOT)} names {name}"


def own_imports(page: str) -> list[tuple[str, str | None]]:
    """(module, name) of what the fenced Python blocks of a page import from the package; name None: the module."""
    found: list[tuple[str, str | None]] = []
    for _, block in re.findall(r"^( *)```(?:python|py)\b[^\n]*\n(.*?)^\1```", page, re.DOTALL | re.MULTILINE):
        for node in ast.walk(ast.parse(textwrap.dedent(block))):
            if isinstance(node, ast.Import):
                found += [(alias.name, None) for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found += [(node.module, alias.name) for alias in node.names]
    return [(module, name) for module, name in found if module.partition(".")[0] == "sparse_context"]


def find_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # what would hold it is no package
        return False


def test_imports_on_the_pages_resolve():
    pages = [*PAGES, ROOT / "sparse_context" / "embedded" / "README.md"]
    found = {page: own_imports(page.read_text()) for page in pages}
    assert found[ROOT / "README.md"] and found[ROOT / "docs" / "evaluation.md"]
    for page, imports in found.items():
        for module, name in imports:
            home = importlib.import_module(module)
            if name is not None and not hasattr(home, name):  # else a module of its own, or a name that is not there
                assert find_module(f"{module}.{name}"), f"{page.relative_to(ROOT)} imports {name} from {module}"


def test_imports_are_found_in_blocks_of_any_indent():
    page = (
        "- a\n\n    ```python\n    import sparse_context.cache\n    from sparse_context import mask, nothing\n    ```\n"
    )
    assert own_imports(page) == [
        ("sparse_context.cache", None),
        ("sparse_context", "mask"),
        ("sparse_context", "nothing"),
    ]
    assert own_imports("```python\nimport torch\nfrom .tokens import x\n```\n```sh\nimport sparse_context\n```\n") == []


def test_every_pipeline_is_on_its_page():
    text = (ROOT / "docs" / "guide" / "pipelines.md").read_text()
    assert [name for name in FAMILIES if f"`{name}`" not in text] == []


def test_pictures_are_few_and_small():
    pictures = list((ROOT / "docs").rglob("*.webp"))
    used = {
        (page.parent / name).resolve()
        for page in PAGES
        for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text())
    }
    assert used == {path.resolve() for path in pictures}
    assert len(pictures) <= 16 and max(path.stat().st_size for path in pictures) <= 150_000
    assert (ROOT / "README.md").read_text().count("![") <= 2


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 170


# Examples -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "embedded"))
def test_example_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert capsys.readouterr().out
    written = list(tmp_path.iterdir())
    assert bool(written) == (name != "own_selector") and all(path.suffix == ".png" for path in written)


def test_the_data_of_the_first_lora_can_be_trained_on(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["make_data", str(tmp_path), "--samples", "1"])
    runpy.run_path(str(EXAMPLES / "first_lora" / "make_data.py"), run_name="__main__")
    for part in ("train", "test"):
        (sample,) = read_samples(str(tmp_path / f"{part}.jsonl"))
        assert sample.prompt.startswith("Make the background plain") and len(sample.references) == 1
        assert sample.open_image().size == (128, 128)


@pytest.mark.slow
def test_notebook_runs(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=":")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the kernel and its client
        import nbformat
        from nbclient import NotebookClient

        notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
        assert not any(cell.get("outputs") for cell in notebook.cells), "its outputs are not committed"
        NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in shown) == 4
    assert any("230 of 1152 tokens" in output.get("text", "") for output in shown)
