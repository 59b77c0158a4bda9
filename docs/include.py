"""Put the tables of results/ into the pages that include them.

    python docs/include.py            # writes
    python docs/include.py --check    # writes nothing; a page that is out of date is an error

A page names a table between two comments, and what stands between them is the table:

    <!-- include results/kv.md -->
    <!-- end -->
"""

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLACES = ("README.md", "docs/**/*.md", "sparse_context/**/*.md", "recipes/**/*.md")
MARKERS = re.compile(r"^(<!-- include (\S+) -->)\n.*?^(<!-- end -->)$", re.DOTALL | re.MULTILINE)


def pages(root: Path = ROOT) -> list[Path]:
    """Every page that may include a table."""
    return sorted(path for place in PLACES for path in root.glob(place))


def included(text: str, root: Path = ROOT) -> str:
    """A page with every table between its markers as the file has it. Raises ValueError for markers that do not fit."""

    def fragment(match: re.Match) -> str:
        begin, name, end = match.groups()
        path = root / name
        if not path.is_file():
            raise ValueError(f"{name} is included, but there is no such file: draw it with `python runs/tables.py`.")
        return f"{begin}\n\n{path.read_text().strip()}\n\n{end}"

    if len(re.findall(r"^<!-- include ", text, re.MULTILINE)) != len(MARKERS.findall(text)):
        raise ValueError("an include comment has no <!-- end --> of its own after it.")
    return MARKERS.sub(fragment, text)


def main() -> None:
    parser = argparse.ArgumentParser(description="Put the tables of results/ into the pages that include them.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a page is out of date")
    check = parser.parse_args().check
    for path in pages():
        text = path.read_text()
        try:
            new = included(text)
        except ValueError as error:
            sys.exit(f"{path.relative_to(ROOT)}: {error}")
        if new != text and check:
            sys.exit(f"{path.relative_to(ROOT)} is out of date: run `python docs/include.py`.")
        if new != text:
            path.write_text(new)


if __name__ == "__main__":
    main()
