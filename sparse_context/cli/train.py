"""`sparse-context train`: fine-tuning with dropped reference tokens."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import options

if TYPE_CHECKING:
    from ..training.options import Settings


def train(
    data: Annotated[
        str | None,
        typer.Option(help="JSONL manifest, folder of a data set, or hub name.", show_default="the one in --config"),
    ] = None,
    model: options.Model = None,
    output_dir: Annotated[
        Path, typer.Option(help="Folder for checkpoints, log, validation images and the result.")
    ] = Path("sparse-context-lora"),
    rank: Annotated[int | None, typer.Option(help="LoRA rank.", show_default="4")] = None,
    full: Annotated[
        bool | None, typer.Option("--full", help="Train all weights of the transformer instead of a LoRA.")
    ] = None,
    kv: Annotated[bool | None, typer.Option("--kv", help="Train for Flux2KleinKVPipeline.")] = None,
    overview_factors: Annotated[
        str | None,
        typer.Option(
            help="Train for overviews that are smaller by one of these factors a side: 2,4.", show_default="none"
        ),
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.", show_default="0.0001")] = None,
    max_train_steps: Annotated[int | None, typer.Option(help="Number of weight updates.", show_default="1000")] = None,
    train_batch_size: Annotated[
        int | None, typer.Option(help="Samples per batch and process.", show_default="1")
    ] = None,
    gradient_accumulation_steps: Annotated[
        int | None, typer.Option(help="Batches per weight update.", show_default="1")
    ] = None,
    resolution: Annotated[
        int | None,
        typer.Option(
            help="Scale larger images down to the area of a square with this side, in pixels.", show_default="512"
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed.", show_default="0")] = None,
    resume: Annotated[str | None, typer.Option(help="latest: resume the run in --output-dir.")] = None,
    check_data: Annotated[
        bool,
        typer.Option(
            "--check-data",
            help="List every bad row and every image of --validation-data that is in the data too, draw a sheet of the "
            "first samples with the tokens that batches keep, and exit without training.",
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Say what a run takes in tokens, memory and time, with one measured step, and exit. What cannot fit "
            "is refused with the settings that would.",
        ),
    ] = False,
    validation_data: Annotated[
        str | None, typer.Option(help="Data as in --data; its first samples are drawn during the run.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="JSON file of settings, such as the config.json of another run.")
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other setting, as field=value: ema=0.99, dropping.dense=0.2. Repeatable."),
    ] = None,
) -> int:
    """Fine-tune a model to work from any subset of its reference tokens: a LoRA, or all weights.

    A flag goes before --set, --set before --config. On several GPUs, run accelerate launch -m sparse_context.training
    with the same options.
    """
    from ..training.options import field_kinds, from_text, read_settings

    factors = "dropping.overview_factors"
    flags = {
        "data": data,
        "model": model,
        "rank": rank,
        "full": full,
        "kv": kv,
        factors: None
        if overview_factors is None
        else from_text("overview_factors", overview_factors, field_kinds()[factors]),
        "learning_rate": learning_rate,
        "max_train_steps": max_train_steps,
        "train_batch_size": train_batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "resolution": resolution,
        "seed": seed,
        "validation_data": validation_data,
    }
    settings = read_settings(config, sets or (), flags)
    if settings.data is None:
        raise ValueError("There is no data to train on: name a manifest, a folder or a hub name with --data.")
    if check_data:
        from ..pipelines.settings import most_references

        code = _check(settings, output_dir, most_references(settings.model))
        if code or not dry_run:
            return code

    options.hide_loading_bars()
    if dry_run:
        from ..training.dry_run import dry_run as predict
        from ..training.memory import return_freed_memory

        return_freed_memory()
        print(predict(settings.model, settings.data, settings.config, settings.run))
        return 0
    from ..training.launch import launch
    from ..training.memory import keep_freed_memory

    keep_freed_memory()
    result = launch(settings.model, settings.data, output_dir, settings.config, settings.run, resume=resume)
    if result is not None:
        print(f"wrote {result}")
    return 0


def _check(settings: "Settings", output_dir: Path, most: int | None) -> int:
    """What --check-data does: exit code 2 where something is wrong."""
    from ..images import save_picture
    from ..samples import check_samples, read_samples
    from ..training.check_data import draw_sheet, find_duplicates

    run = settings.run
    assert settings.data is not None
    problems = check_samples(settings.data, most_references=most, **run.source)
    if problems:
        print("\n".join(problems))
        return 2
    samples = read_samples(settings.data, most_references=most, **run.source)
    for note in samples.notes:
        print(note)
    print(f"{settings.data}: every row is good.")
    if run.validation_data is not None:
        source = run.source if run.validation_split is None else {**run.source, "split": run.validation_split}
        problems = check_samples(run.validation_data, most_references=most, **source)
        if problems:
            print("\n".join(f"{run.validation_data}: {problem}" for problem in problems))
            return 2
        duplicates = find_duplicates(samples, read_samples(run.validation_data, most_references=most, **source))
        print("\n".join(duplicates) if duplicates else f"{run.validation_data}: no image is in the data too.")
    token = 8 if settings.model is None else 16  # of the embedded model, and of all others
    drawn = draw_sheet(samples, settings.config.dropping, token=token, seed=settings.config.seed, **run.sides)
    output_dir.mkdir(parents=True, exist_ok=True)
    sheet = output_dir / "check-data.png"
    save_picture(drawn, sheet)
    print(f"wrote {sheet}")
    return 2 if run.validation_data is not None and duplicates else 0
