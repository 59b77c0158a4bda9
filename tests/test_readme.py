"""The README says what the code and the results say."""

import importlib.util
import re
from pathlib import Path

from sparse_context.result import selection_version

ROOT = Path(__file__).parents[1]


def load_readme():
    spec = importlib.util.spec_from_file_location("readme", ROOT / "runs" / "readme.py")
    readme = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readme)
    return readme


def test_results_of_another_net_or_rule_are_named():
    readme = load_readme()
    today, before, silent = (
        {"config": {"split": split}, "versions": versions}
        for split, versions in (
            ("test", {"selection": selection_version()}),
            ("validation", {"selection": "0"}),
            ("validation", {}),
        )
    )
    assert readme._choice_since(today) == "" != readme._choice_since(before)
    assert readme._choice_since(today, before).endswith("those of the validation split are of the ones before.")
    readme.UNRECORDED = selection_version()
    assert readme._choice_since(silent, today) == ""
    readme.UNRECORDED = "another"
    assert readme._choice_since(silent).endswith("these are of the ones before.")


def test_tables_are_made_from_the_code_and_the_results():
    readme = load_readme()
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
