"""The gates that the embedded model's weights for overviews had to pass, on a hundred validation scenes of each task.

    python runs/overview_gates.py --folder checkpoints             # needs `python -m recipes.mini data` there

What each gate is made from, `recipes/mini/overview_gates.py` says. Figures are kept in the folder as they come, in
`shipped/gates.jsonl`, so that a run that was stopped goes on; `--tasks` makes a part of them.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

from tables import RESULTS, draw, machine, read, table

from recipes.mini.overview_gates import SHIPPED, TASKS, Gate, fingerprint_of, run_gate
from sparse_context.pipelines.embedded import OVERVIEW, adapter_record
from sparse_context.result import checkout, write_result

EDITS = (
    Gate("base", keep=1),
    Gate("dropper", keep=0.2),
    Gate("student", 2),
    Gate("student", 4, 0.2),
)
SUBJECTS = tuple(
    gate._replace(rule="mask")
    for gate in (
        Gate("base", keep=1),
        Gate("dropper", keep=0.2),
        Gate("student", 4, 0.2),
        Gate("dropper", keep=0.1),
        Gate("student", 4, 0.1),
    )
)


class Asked(NamedTuple):
    """What a gate asks for: of `gate` on `task`, `more` dB more than of `than`; without the latter, `more` dB."""

    what: str
    task: str
    gate: Gate
    more: float
    than: Gate | None = None


ASKED = (
    Asked("1: an overview by 2 alone reaches 25 dB", "edit_global", Gate("student", 2), 25.0),
    *(
        Asked("2: by 4, 5 dB ahead of dropping at 0.2", task, Gate("student", 4, 0.2), 5.0, Gate("dropper", keep=0.2))
        for task in ("edit_global", "edit_background", "edit_object")
    ),
    *(
        Asked(f"3: subjects {how} dropping at {keep:g}", task, Gate("student", 4, keep, "mask"), 0.0, than)
        for task in ("subject_place", "subject_pair")
        for how, keep in (("no worse than", 0.2), ("ahead of", 0.1))
        for than in (Gate("dropper", keep=keep, rule="mask"),)
    ),
)


def gates_of(task: str) -> tuple[Gate, ...]:
    return SUBJECTS if task.startswith("subject_") else EDITS


# Tables ---------------------------------------------------------------------------------------------------------------


def overview_gates() -> str:
    """What each gate asks for, and what the weights reach."""
    result = read("overview_gates")
    psnr, rows = result["figures"]["psnr"], []
    for asked in ASKED:
        reached = psnr[asked.task][str(asked.gate)]
        than = 0.0 if asked.than is None else psnr[asked.task][str(asked.than)]
        found = f"{reached:.1f} dB" if asked.than is None else f"{reached - than:+.1f} dB ({reached:.1f}, {than:.1f})"
        passed = "yes" if reached - than >= asked.more else "no"
        rows.append([asked.what, asked.task, found, f"{psnr[asked.task]['base']:.1f} dB", passed])
    return table(["gate", "task", "reached", "all tokens", "passed"], rows) + f"\n\n{machine(result)}"


TABLES = {"overview_gates": overview_gates}

# The run --------------------------------------------------------------------------------------------------------------


def known(folder: Path, scenes: int) -> dict[str, dict[str, float]]:
    """What the folder holds of so many scenes, by the weights that ship now: PSNR by task and gate."""
    file, found = folder / SHIPPED / "gates.jsonl", dict[str, dict[str, float]]()
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        record = json.loads(line)
        asked = record["scenes"] == scenes and record.get("weights") == fingerprint_of(OVERVIEW)
        for gate, by_task in record["psnr"].items() if asked else ():
            for task, level in by_task.items():
                found.setdefault(task, {})[gate] = level
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="The gates of the embedded model's weights for overviews.")
    parser.add_argument("--folder", type=Path, default=Path("checkpoints"), help="with assets.safetensors")
    parser.add_argument("--scenes", type=int, default=100, help="of each task")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, help="only make these, and write no result")
    parser.add_argument("--table", action="store_true", help="only draw the table of results/ again, from the JSON")
    arguments = parser.parse_args()
    checkout()  # of the code that runs, whatever is committed meanwhile
    if arguments.table:
        return draw(TABLES)
    for task in arguments.tasks or TASKS:
        made = known(arguments.folder, arguments.scenes).get(task, {})
        for gate in gates_of(task):  # each kept as soon as it is there
            if str(gate) not in made:
                run_gate(arguments.folder, None, arguments.scenes, [gate], [task])
    if arguments.tasks:
        return
    found = known(arguments.folder, arguments.scenes)
    figures = {"psnr": {task: {str(gate): found[task][str(gate)] for gate in gates_of(task)} for task in TASKS}}
    config = {"scenes": arguments.scenes, "weights": adapter_record(OVERVIEW)}
    write_result(RESULTS / "overview_gates.json", "overview_gates", config, figures)
    draw(TABLES)
    print(overview_gates())


if __name__ == "__main__":
    main()
