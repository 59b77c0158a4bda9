"""Helpers for the tests of batches."""

import json

from tiny import picture

from sparse_context.batch.jobs import read_jobs
from sparse_context.pipelines.settings_file import Settings, parse_settings

ROWS = [
    {"references": ["a.png", "b.png"], "prompt": "the cat", "name": "one"},
    {"references": ["a.png"], "prompt": "the cat", "keep": 0.5, "seed": 1},
    {"references": ["c.png", "a.png"], "prompt": "the dog", "selector": {"edges": 1, "uniform": 1}},
    {"prompt": "a room"},
]


def write_jobs(folder, rows):
    """A file of jobs, beside the pictures a, b and c."""
    for name, seed in (("a", 0), ("b", 1), ("c", 2)):
        if not (folder / f"{name}.png").exists():
            picture(64, 64, seed).save(folder / f"{name}.png")
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "jobs.jsonl").write_text("\n".join(lines))
    return folder / "jobs.jsonl"


def base_of(model, **values) -> Settings:
    return parse_settings({"model": str(model), "dtype": "float32", "device": "cpu", "steps": 2, **values})


def jobs_of(folder, rows, base=None):
    return read_jobs(write_jobs(folder, rows), base or Settings())


def times_of(folder):
    """When each file of an output was last written."""
    return {path.name: path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.is_file()}
