"""A batch against the same jobs one by one, on this machine: pictures a minute, everything counted that one waits for.

    python runs/batch_speed.py [--jobs 48] [--output results/batch_speed.json]

The embedded model on scenes of the demo, whose references recur in every third job. The ways: the command `generate`
for each job (of which a few are made, for each takes as long as the next), one `Engine` that answers one request after
another, and `batch` with one worker and with two. Loading the model counts. All ways have the same cores; the pictures
of all have to be the same.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from tables import draw, machine, read, table

from sparse_context.batch.jobs import Job, read_jobs
from sparse_context.batch.run import run_batch
from sparse_context.embedded.demo import EXAMPLES
from sparse_context.images import open_picture, save_picture
from sparse_context.pipelines.engine import Engine
from sparse_context.pipelines.settings_file import Settings
from sparse_context.result import checkout, write_result

ROOT = Path(__file__).resolve().parents[1]
SCENES = ("in-front", "side-by-side", "quarters")
FIRST = "one engine, one job after another"


def write_jobs(path: Path, count: int) -> list[Job]:
    """Jobs of the demo's scenes in turns, each with a seed of its own."""
    listing = {entry["name"]: entry for entry in json.loads((EXAMPLES / "scenes.json").read_text(encoding="utf-8"))}
    rows = []
    for i in range(count):
        scene = listing[SCENES[i % len(SCENES)]]
        references = [str(EXAMPLES / file) for file in scene["references"]]
        rows.append({"references": references, "prompt": scene["prompt"], "seed": i})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [job for job in read_jobs(path, Settings()) if isinstance(job, Job)]


def by_command(jobs: list[Job], folder: Path) -> None:
    for job in jobs:
        command = [sys.executable, "-m", "sparse_context", "generate", "--prompt", job.sample.prompt]
        command += [part for reference in job.sample.references for part in ("--image", str(reference))]
        command += ["--seed", str(job.settings.request.seed), "--output", str(folder / f"{job.name}.png")]
        subprocess.run(command, check=True, capture_output=True)


def by_engine(jobs: list[Job], folder: Path) -> None:
    engine = Engine(bar=False)
    for job in jobs:
        save_picture(engine(job.read()).image, folder / f"{job.name}.png")


def largest_difference(first: Path, other: Path, jobs: list[Job]) -> int:
    """Of any pixel of any picture, in grey levels."""
    pairs = ((open_picture(folder / f"{job.name}.png") for folder in (first, other)) for job in jobs)
    return max(int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max()) for a, b in pairs)


def batch() -> str:
    result = read("batch_speed")
    rows = [[name, f"{way['jobs']}", f"{way['speedup']:.2f}x"] for name, way in result["figures"].items()]
    return f"{table(['way', 'jobs', 'images per minute, against one engine'], rows)}\n\n{machine(result)}"


TABLES = {"batch_speed": batch}


def main() -> None:
    parser = argparse.ArgumentParser(description="A batch against the same jobs one by one.")
    parser.add_argument("--jobs", type=int, default=48)
    parser.add_argument("--commands", type=int, default=3, help="how many of the jobs the command makes one by one")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "batch_speed.json")
    parser.add_argument("--table", action="store_true", help="only draw the tables of results/ again, from the JSON")
    arguments = parser.parse_args()
    checkout()  # of the code that runs, whatever is committed meanwhile
    if arguments.table:
        return draw(TABLES)

    figures: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        jobs = write_jobs(place / "jobs.jsonl", arguments.jobs)
        ways = {
            "the command, a process a job": (by_command, jobs[: arguments.commands]),
            FIRST: (by_engine, jobs),
            **{
                f"batch, {count} worker{'s' * (count > 1)}": (
                    lambda jobs, folder, count=count: run_batch(jobs, Settings().spec, folder, workers=count),
                    jobs,
                )
                for count in arguments.workers
            },
        }
        for i, (way, (make, some)) in enumerate(ways.items()):
            folder = place / str(i)
            folder.mkdir()
            start = time.perf_counter()
            make(some, folder)
            seconds = time.perf_counter() - start
            figures[way] = {"jobs": len(some), "seconds": round(seconds, 2)}
            figures[way]["pictures_a_minute"] = round(60 * len(some) / seconds, 2)
        for i, (way, (_, some)) in enumerate(ways.items()):
            figures[way]["speedup"] = round(figures[way]["pictures_a_minute"] / figures[FIRST]["pictures_a_minute"], 3)
            figures[way]["largest_difference"] = largest_difference(place / "1", place / str(i), some)
            print(way, figures[way])
    config = {"jobs": arguments.jobs, "scenes": SCENES, "threads": os.environ.get("OMP_NUM_THREADS")}
    write_result(arguments.output, "batch", config, figures)
    draw(TABLES)


if __name__ == "__main__":
    main()
