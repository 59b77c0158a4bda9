"""`sparse-context batch`: many requests from a file."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from . import options

SHOWN = 5  # failures on the terminal; the others are in the records


def batch(
    context: typer.Context,
    jobs: Annotated[Path, typer.Argument(help="JSONL file, one job a line: references, prompt and settings.")],
    output: Annotated[
        Path, typer.Option(help="Folder for the pictures and a record of each job. A second run into it resumes.")
    ],
    workers: Annotated[
        int | None,
        typer.Option(help="Processes, each with the model loaded.", show_default="one for each CUDA device, or 1"),
    ] = None,
    format: Annotated[str, typer.Option(help="Format of the pictures: png, jpg or webp.")] = "png",
    model: options.Model = None,
    keep: options.Keep = None,
    selector: options.Selector = None,
    task: options.Task = None,
    text_model: options.TextModel = None,
    overview: options.Overview = None,
    overview_layout: options.OverviewLayout = None,
    coverage: options.Coverage = None,
    merge: options.Merge = 0.0,
    share: options.Share = "equal",
    floor: options.Floor = 1,
    lora: options.Lora = None,
    lora_scale: options.LoraScale = 1.0,
    kv: options.KV = False,
    seed: options.Seed = 0,
    steps: options.Steps = None,
    height: options.Height = None,
    width: options.Width = None,
    guidance_scale: options.GuidanceScale = None,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    cpu_offload: options.CpuOffload = None,
    quantization: options.Quantization = None,
    settings: options.SettingsFile = None,
    ray: options.Ray = False,
    gpus: options.Gpus = 0.0,
    as_json: options.AsJson = False,
) -> int:
    """Make a picture of every job in a file. A job's own settings go before these options. Exit code 1: some failed."""
    from ..images import WRITE_FORMATS

    if f".{format}" not in WRITE_FORMATS:
        raise ValueError(f"format is {format!r}: choose png, jpg or webp.")
    if gpus and not ray:
        raise ValueError("--gpus is for workers on Ray: pass --ray too, or leave it out.")
    if os.path.realpath(jobs) == os.path.realpath(output / "results.jsonl"):
        raise ValueError(f"{jobs} would be overwritten by the results: choose another --output.")
    from ..batch.jobs import Job, read_jobs
    from ..pipelines.settings import check_references

    chosen = options.settings_of(context, settings)
    read = read_jobs(jobs.absolute() if ray else jobs, chosen)  # whose workers are in other folders
    ignored = sorted({key for job in read if isinstance(job, Job) for key in job.ignored})
    options.hide_loading_bars()
    kinds = {(len(job.sample.references), job.inpaint is not None) for job in read if isinstance(job, Job)}
    refused = []
    for count, paints in sorted(kinds):
        try:
            check_references(chosen.spec.model, count, paints)
        except ValueError as error:
            refused.append(error)
    if len(refused) == len(kinds):  # of which each job says so otherwise
        raise refused[0]
    from ..batch.run import run_batch

    summary = run_batch(read, chosen.spec, output, suffix=f".{format}", workers=workers, ray_gpus=gpus if ray else None)
    if as_json:
        print(json.dumps(summary.to_dict() | {"ignored": ignored}, indent=2))
        return 1 if summary.failed else 0
    print(summary)
    for record in summary.failed[:SHOWN]:
        said = (
            record["reason"] if record["name"] is None else f"{record['where']} ({record['name']}): {record['reason']}"
        )
        print(f"failed: {said}")
    if len(summary.failed) > SHOWN:
        print(f"... and {len(summary.failed) - SHOWN} more")
    if ignored:
        print(f"keys of no meaning here: {', '.join(ignored)}")
    print(f"wrote {output / 'results.jsonl'}")
    return 1 if summary.failed else 0
