"""The README says what the code and the results say."""

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_tables_are_made_from_the_code_and_the_results():
    spec = importlib.util.spec_from_file_location("readme", ROOT / "runs" / "readme.py")
    readme = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readme)
    for page, tables in readme.PAGES.items():
        text = (ROOT / page).read_text()
        assert readme.render(text, tables) == text, page
    text = (ROOT / "README.md").read_text()
    assert readme.render(re.sub(r"(begin pipelines -->).*?(<!-- end)", r"\1\n\2", text, flags=re.S)) == text


def test_every_file_it_names_is_there():
    text = (ROOT / "README.md").read_text()
    tree = text.split("## What is where")[1].split("```")[1]
    for name in re.findall(r"^  (\S+)", tree, re.M):
        assert (ROOT / "sparse_context" / name).exists(), name
    for name in re.findall(r"\]\(((?!http)[^)]+)\)|`((?:runs|sparse_context)/\S+?)`", text):
        assert (ROOT / (name[0] or name[1])).exists(), name
