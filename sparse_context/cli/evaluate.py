"""`sparse-context evaluate`: quality against the tokens that are kept."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from . import options


def evaluate(
    data: Annotated[
        str, typer.Option(help="JSONL manifest, data of another trainer, hub name, or the folder of the benchmark.")
    ],
    benchmark: Annotated[
        str | None,
        typer.Option(help="Read the data as a benchmark's: pie-bench, dreambench++, customconcept101 or omnicontext."),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            help="Keep all outputs and write what a judge is asked of them: the benchmark's own words, from this place "
            "in its authors' code, or the word own.",
            show_default="no judge",
        ),
    ] = None,
    dataset_config_name: options.ConfigName = None,
    split: options.Split = "train",
    image_column: options.ImageColumn = "image",
    cond_image_column: options.CondImageColumn = "references",
    caption_column: options.CaptionColumn = "prompt",
    model: options.Model = None,
    keep: Annotated[
        str, typer.Option(help="Ratios, counts or auto, separated by commas. 1 is always measured too.")
    ] = "0.5,0.2,0.1",
    selector: Annotated[
        list[str] | None,
        typer.Option(help="Selector as in generate. Repeat it to compare several.", show_default="auto"),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="Metric, as NAME or NAME=MODEL. Repeat it for several.", show_default="all that need no model"
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="Task as in generate. Repeat it to compare several.", show_default="auto"),
    ] = None,
    overview: Annotated[
        list[str] | None,
        typer.Option(help="Overview as in generate. Repeat it to compare several.", show_default="trained"),
    ] = None,
    overview_layout: options.OverviewLayout = None,
    coverage: Annotated[
        list[float] | None,
        typer.Option(help="Coverage as in generate. Repeat it to compare several.", show_default="by task"),
    ] = None,
    merge: Annotated[
        list[float] | None,
        typer.Option(help="Merge as in generate. Repeat it to compare several.", show_default="0"),
    ] = None,
    text_model: options.TextModel = None,
    share: options.Share = "equal",
    floor: options.Floor = 1,
    limit: Annotated[int | None, typer.Option(help="Number of samples to use, from the first.")] = None,
    lora: options.Lora = None,
    lora_scale: options.LoraScale = 1.0,
    kv: options.KV = False,
    seed: Annotated[int, typer.Option(help="Random seed; sample i uses seed + i.")] = 0,
    steps: options.Steps = None,
    guidance_scale: options.GuidanceScale = None,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    cpu_offload: options.CpuOffload = None,
    quantization: options.Quantization = None,
    output: Annotated[Path, typer.Option(help="Folder for figures and images. A second run into it resumes.")] = Path(
        "evaluation"
    ),
) -> None:
    """Measure quality at several keep ratios, on the same noise, with 95 % confidence intervals."""
    from ..evaluation.benchmarks import find_benchmark, paper_tables
    from ..evaluation.evaluate import evaluate, fingerprint, open_folder
    from ..evaluation.grid import grid, maker
    from ..evaluation.judge import check_wording, write_questions
    from ..evaluation.metrics import METRICS, find_metrics, try_out
    from ..evaluation.plots import check_installed, draw_all
    from ..evaluation.report import table
    from ..images import save_text
    from ..pipelines.engine import Engine
    from ..pipelines.settings import check_references, most_references
    from ..pipelines.spec import ModelSpec
    from ..samples import read_samples, source_of

    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}: pass a number of samples, 1 or more.")
    chosen = None if benchmark is None else find_benchmark(benchmark)
    questions = () if chosen is None else chosen.questions
    if judge is not None and not questions:
        raise ValueError(f"judge is {judge!r}, and {benchmark or 'a plain manifest'} has no judge: leave it out.")
    columns = (dataset_config_name, split, image_column, cond_image_column, caption_column)
    if chosen is not None and columns != (None, "train", "image", "references", "prompt"):
        raise ValueError(
            f"{benchmark} has a layout of its own: leave --split, --dataset-config-name and the columns out."
        )
    own = {} if chosen is None else chosen.metrics
    free = [name for name, each in own.items() if each.model is None]
    free = free or [name for name, each in METRICS.items() if each.model is None]
    metrics = find_metrics(metric or free, {**own, **METRICS})
    check_installed(metrics, data if chosen is None else None)
    keeps, selectors = (
        [options.read_keep(text) for text in keep.split(",")],
        [options.read_selector(s) for s in selector or ["auto"]],
    )
    cells = grid(
        keeps,
        selectors,
        tasks=task or ["auto"],
        coverages=coverage or [None],
        merges=merge or [0.0],
        overviews=[options.read_overview(text) for text in overview or ["trained"]],
        overview_layout=overview_layout,
        text_model=text_model,
        share=share,
        floor=floor,
    )
    if chosen is None:
        source = source_of(dataset_config_name, split, image_column, cond_image_column, caption_column)
        read = read_samples(data, needs_image=False, most_references=most_references(model), **source)
        samples, part = read[:limit], {"data_split": read.split, "data_config": read.config}
        for note in read.notes:
            print(note, file=sys.stderr)
    else:
        samples, part = chosen.read(data)[:limit], {"benchmark": benchmark}
    if judge is not None:
        check_wording(questions, samples, judge)
    spec = ModelSpec(model, dtype, device, cpu_offload, lora, lora_scale, kv, quantization)
    options.hide_loading_bars()
    try_out(metrics)
    open_folder(output)
    for count in sorted({len(sample.references) for sample in samples}):
        check_references(model, count, inpaint=False)
    engine = Engine(spec, bar=False)
    pipe = engine.pipe()
    pipe.set_progress_bar_config(disable=True)
    about = {
        "data": data,
        **part,
        "model": model or "embedded",
        "lora": lora,
        "lora_scale": lora_scale,
        "weights": fingerprint(pipe),
        "steps": steps,
        "guidance_scale": guidance_scale,
        "dtype": dtype,
        **({"kv": True} if kv else {}),
        **({"quantization": quantization} if quantization else {}),
    }
    make = maker(pipe, steps=steps, guidance_scale=guidance_scale)
    for name, cell in cells.items():
        own = engine.pipe(cell.config) if cell.config.names_overview else pipe
        if own is not pipe:  # the embedded model has weights of their own for overviews
            own.set_progress_bar_config(disable=True)
            by = maker(own, steps=steps, guidance_scale=guidance_scale)
            cells[name] = replace(cell, make=by, about={**cell.about, "weights": fingerprint(own)})
    result = evaluate(make, samples, cells, metrics, output, seed=seed, about=about, keep_outputs=judge is not None)
    written = [output / "result.json", *draw_all(result, output, samples)]
    if chosen is not None:
        written.append(output / "benchmark.md")
        save_text(paper_tables(result, chosen), written[-1])
    if judge is not None:
        written.append(write_questions(questions, samples, list(cells), output, judge))
    print(table(result))
    print(f"wrote {', '.join(map(str, written))}")
