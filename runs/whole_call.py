"""Where the time of a sparse call goes, at several commits of this repository, in one run.

    python runs/whole_call.py [--turns 5] [--calls 4] [--output results/whole_call.json]

The embedded model, four references that were never seen before, all of the call but the loading. Each commit has a
process of its own, from a checkout of its own, and the processes take turns; one makes a call to warm up and then
`--calls` calls. A figure is the median over the turns of their medians, and the ratio of totals is taken within a turn.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median

from tables import draw, machine, read, table
from tqdm import tqdm

from sparse_context.result import checkout, write_result

ROOT = Path(__file__).resolve().parents[1]
COMMITS = {
    "38c9971": "before",
    "7ca5f64": "each reference looked at and hashed once, pixels as bytes",
    "cb1dfbd": "fewer steps to the same tokens",
    "HEAD": "now",
}
"""What was measured, and what is new in it."""
PHASES = ("text", "encode", "selection", "denoise", "decode", "total")
CALL = """
import json, sys
from dataclasses import asdict
from statistics import median
import torch
from sparse_context import SparseContextConfig, apply_sparse_context
from sparse_context.embedded.demo import read_examples
from sparse_context.pipelines.load import load
from sparse_context.pipelines.settings import call_inputs, call_settings, reference_sides
from sparse_context.pipelines.spec import ModelSpec
from sparse_context.pipelines.timing import timed
from sparse_context.preview import fit_reference

keep, calls = float(sys.argv[1]), int(sys.argv[2])
scene = next(each for each in read_examples() if len(each["references"]) == 4)
pipe = load(ModelSpec(device="cpu"))
pipe.set_progress_bar_config(disable=True)
settings = call_settings(pipe)
given = {dial: value for dial, value in settings.items() if dial in call_inputs(pipe)}
sides = reference_sides(settings["reference_size"], SparseContextConfig(), 4)
references = [fit_reference(*pair) for pair in zip(scene["references"], sides, strict=True)]
apply_sparse_context(pipe, keep=keep)
found = []
for number in range(calls + 1):
    with timed(pipe) as times:
        pipe(image=references, prompt=scene["prompt"], guidance_scale=1.0,
             generator=torch.Generator().manual_seed(0), **given)
    found.append(asdict(times))
print(json.dumps({phase: median(call[phase] for call in found[1:]) for phase in found[0]}))
"""

# Tables ---------------------------------------------------------------------------------------------------------------


def whole_call() -> str:
    """Shares of the first commit's total, by phase; a phase that is hidden behind another counts nothing there."""
    result = read("whole_call")
    rows = []
    for name, row in result["figures"]["commits"].items():
        shares = [f"{100 * row['shares'][phase]:.1f} %" for phase in (*PHASES, "rest")]
        faster = row["faster"]
        rows.append([name, *shares, f"{faster['median']:.2f}x ({faster['min']:.2f} to {faster['max']:.2f})"])
    return f"{table(['', *PHASES, 'rest', 'as fast'], rows)}\n\n{machine(result)}"


TABLES = {"whole_call": whole_call}

# The run --------------------------------------------------------------------------------------------------------------


def call_at(folder: Path, keep: float, calls: int) -> dict[str, float]:
    """Seconds by phase, by the code in `folder`."""
    environment = os.environ | {"PYTHONPATH": str(folder)}
    command = [sys.executable, "-c", CALL, str(keep), str(calls)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, encoding="utf-8")
    if done.returncode:
        raise SystemExit(f"whole_call: the code in {folder} fails.\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def figures_of(turns: Mapping[str, list[dict[str, float]]]) -> dict[str, object]:
    """Medians by commit and phase, as shares of the first commit's total, and how many times as fast as it each is."""
    first = next(iter(turns.values()))
    whole = median(call["total"] for call in first)
    found = {}
    for name, calls in turns.items():
        shares = {phase: median(call[phase] for call in calls) / whole for phase in PHASES}
        shares["rest"] = shares["total"] - sum(shares[phase] for phase in PHASES[:-1])
        faster = sorted(a["total"] / b["total"] for a, b in zip(first, calls, strict=True))
        found[name] = {
            "shares": {phase: round(share, 4) for phase, share in shares.items()},
            "faster": {"median": round(median(faster), 3), "min": round(faster[0], 3), "max": round(faster[-1], 3)},
        }
    return {"commits": found}


def main() -> None:
    parser = argparse.ArgumentParser(description="Where the time of a sparse call goes, at several commits.")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--calls", type=int, default=4, help="of each process")
    parser.add_argument("--keep", type=float, default=0.15)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "whole_call.json")
    parser.add_argument("--table", action="store_true", help="only draw the tables of results/ again, from the JSON")
    arguments = parser.parse_args()
    checkout()  # of the code that runs, whatever is committed meanwhile
    if arguments.table:
        return draw(TABLES)

    turns: dict[str, list[dict[str, float]]] = {name: [] for name in COMMITS.values()}
    with tempfile.TemporaryDirectory(prefix="whole-call-") as place:
        folders = {}
        for commit, name in COMMITS.items():
            folders[name] = Path(place) / commit
            subprocess.run(["git", "clone", "--quiet", "--shared", ROOT, folders[name]], check=True)
            hash_of = subprocess.run(
                ["git", "rev-parse", commit], cwd=ROOT, check=True, capture_output=True, encoding="utf-8"
            )
            subprocess.run(["git", "checkout", "--quiet", hash_of.stdout.strip()], cwd=folders[name], check=True)
        for turn in tqdm(range(arguments.turns), desc="turns"):
            order = list(folders) if turn % 2 else list(reversed(folders))
            for name in order:
                turns[name].append(call_at(folders[name], arguments.keep, arguments.calls))
    config = {name: getattr(arguments, name) for name in ("turns", "calls", "keep")}
    config |= {"model": "embedded", "references": 4, "commits": COMMITS}
    write_result(arguments.output, "whole_call", config, {**figures_of(turns), "seconds": turns})
    draw(TABLES)
    print(whole_call())


if __name__ == "__main__":
    main()
