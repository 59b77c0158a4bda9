"""Write the tables of README.md from the code and from results/*.json, between their markers.

    python runs/readme.py [--check]

With --check nothing is written, and a README that is out of date is an error: so no figure in it is typed by hand.
"""

import json
import re
import sys
from pathlib import Path

from sparse_context.families import FAMILIES

ROOT = Path(__file__).resolve().parents[1]


def pipelines() -> str:
    rows = "\n".join(
        f"| `{name}` | `families/{attach.__module__.rpartition('.')[2]}.py` |" for name, attach in FAMILIES.items()
    )
    return f"| pipeline | file |\n|---|---|\n{rows}"


def _read(name: str) -> dict:
    return json.loads((ROOT / "results" / f"{name}.json").read_text())


def _machine(result: dict) -> str:
    hardware = result["hardware"]
    return f"{hardware['cpu']}, {hardware['cores']} cores"


def core_speed() -> str:
    result = _read("core_speed")
    lines = ["| references | tokens kept | end to end | denoising alone |", "|---|---|---|---|"]
    for count, row in result["figures"].items():
        faster = row["times faster"]
        lines.append(
            f"| {count} | {row['tokens']['kept']} of {row['tokens']['of']} | {faster['total']['median']:.2f}x "
            f"({faster['total']['min']:.2f} to {faster['total']['max']:.2f}) | {faster['denoise']['median']:.2f}x |"
        )
    config = result["config"]
    return "\n".join(lines) + (
        f"\n\nTimes faster than dense at keep {config['keep']}: the embedded model, {config['num_inference_steps']} "
        f"steps, {config['dtype']}, the median of {config['turns']} interleaved turns and their range, on "
        f"{_machine(result)} (`runs/core_speed.py`)."
    )


def selection() -> str:
    result = _read("selection")
    times = result["figures"]["milliseconds"]
    head = "| " + " | ".join(times) + " |\n|" + "---|" * len(times)
    row = "| " + " | ".join(f"{t['median'] / times['edges']['median']:.2f}" for t in times.values()) + " |"
    under = [name for name, t in times.items() if t["median"] <= 10]
    return (
        f"{head}\n{row}\n\nTime to select from a 1-megapixel reference on one core, as a share of what `edges` takes; "
        f"at most 10 ms for {', '.join(under)} on {_machine(result)} (`runs/time_selection.py`)."
    )


TABLES = {"pipelines": pipelines, "core_speed": core_speed, "selection": selection}


def render(text: str) -> str:
    """`text` with every table between `<!-- begin NAME -->` and `<!-- end NAME -->` made anew."""
    for name, make in TABLES.items():
        pattern = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"README.md has no markers for the table {name}")
        text = pattern.sub(rf"\g<1>{make()}\n\g<2>", text)
    return text


def main() -> None:
    path = ROOT / "README.md"
    before = path.read_text()
    after = render(before)
    if "--check" in sys.argv[1:]:
        sys.exit("README.md is out of date: run `python runs/readme.py`" if after != before else 0)
    path.write_text(after)


if __name__ == "__main__":
    main()
