"""A run from options: what `sparse-context train` and `accelerate launch -m sparse_context.training` do."""

import contextlib
import importlib.util
import os
import sys
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import nn

from ..families import find_host
from ..pipelines.load import load_pipeline
from ..pipelines.lora_file import NO_LORA
from ..pipelines.settings import call_settings, most_references
from ..samples import check_pictures, needs_datasets, read_samples
from .batch import Encoding
from .cache import Cache
from .card import EMBEDDED
from .checkpoints import has_begun
from .config import TrainConfig
from .data import Batches, check_workers, open_example
from .dropping import Dropping
from .files import alone
from .finetune import Run, Watch, finetune
from .run_folder import check_folder


def launch(
    model: str | None,
    data: str,
    output: Path,
    *,
    dropping: Dropping,
    source: Mapping[str, Any],
    resume: str | None = None,
    train_batch_size: int = 1,
    resolution: int = 512,
    reference_resolution: int | None = None,
    mixed_precision: str | None = None,
    dtype: str = "auto",
    validation_data: str | None = None,
    validation_split: str | None = None,
    num_validation_images: int = 4,
    dataloader_num_workers: int = 0,
    cache_latents: bool = False,
    cache_text: bool = False,
    cache_dir: Path | None = None,
    report_to: str | None = None,
    **settings: Any,
) -> Path | None:
    """Load, train, write. Returns the path of the result, on the main process; None on the others.

    source: keywords of `manifest.read_samples`, for `validation_data` too, but for its split where `validation_split`
    names one. settings: fields of `TrainConfig`. Everything that can be wrong with the options is found before a
    model is loaded. Raises ValueError and OSError in one sentence.
    """
    config = TrainConfig(dropping=dropping, **settings)
    if resume not in (None, "latest"):
        raise ValueError(f"resume is {resume!r}: pass latest, or leave it out to start anew.")
    if mixed_precision not in (None, "no", "bf16"):
        raise ValueError(f"mixed_precision is {mixed_precision!r}: choose no or bf16.")
    if report_to not in (None, "tensorboard"):
        raise ValueError(f"report_to is {report_to!r}: pass tensorboard, or leave it out.")
    _check_installed(report_to, data, validation_data)
    if dtype in ("float16", "fp16"):
        raise ValueError(f"dtype is {dtype!r}, in which gradients vanish: choose auto, bfloat16 or float32.")
    sides = {
        "resolution": resolution,
        "reference_resolution": resolution if reference_resolution is None else reference_resolution,
    }
    for name, side in sides.items():
        if side < 64:
            raise ValueError(f"{name} is {side}: pass 64 or more pixels.")
    for name, count in (("train_batch_size", train_batch_size), ("num_validation_images", num_validation_images)):
        if count < 1:
            raise ValueError(f"{name} is {count}: pass a whole number, 1 or more.")
    if dataloader_num_workers < 0:
        raise ValueError(f"dataloader_num_workers is {dataloader_num_workers}: pass a number of processes, or 0.")
    check_workers(dataloader_num_workers)
    if validation_split is not None and validation_data is None:
        raise ValueError(
            f"validation_split is {validation_split!r}, but there is no data for it: name it with --validation-data, "
            "which may be the same as --data."
        )
    check_folder(output, resume is not None, config.max_train_steps)
    most = most_references(model)
    samples = read_samples(data, most_references=most, **source)
    held_out = []
    if validation_data is not None:
        held_source = source if validation_split is None else {**source, "split": validation_split}
        held_out = read_samples(validation_data, most_references=most, **held_source)[:num_validation_images]
    shown = [open_example(sample, *sides.values()) for sample in held_out]
    check_pictures(samples)

    import torch
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    if mixed_precision is None and "ACCELERATE_MIXED_PRECISION" not in os.environ:  # which accelerate launch sets
        mixed_precision = "bf16" if torch.accelerator.is_available() else "no"
    accelerator = Accelerator(
        mixed_precision=mixed_precision,
        log_with=report_to,
        project_dir=output,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],  # others wait while one validates
    )
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ValueError(f"mixed_precision is {accelerator.mixed_precision!r}: choose no or bf16.")

    def trackers() -> list[Any]:
        if report_to and not accelerator.trackers:  # at the first record, for what is refused writes nothing
            accelerator.init_trackers(report_to)
        return accelerator.trackers

    def log(step: int, record: Mapping[str, float]) -> None:
        for tracker in trackers():
            tracker.log({name: value for name, value in record.items() if name != "step"}, step=step)

    def log_picture(step: int, picture: Image.Image) -> None:
        for tracker in trackers():
            tracker.writer.add_image("validation", np.asarray(picture), step, dataformats="HWC")

    folder = cache_dir or output / "cache"
    try:
        with alone(output) if accelerator.is_main_process else contextlib.nullcontext():
            if accelerator.is_main_process and resume and not has_begun(output):
                print(f"{output} holds no checkpoint, so the run starts anew.", file=sys.stderr)
            pipe = load_pipeline(model, dtype=dtype, device=str(accelerator.device), lora=NO_LORA)
            host = find_host(pipe, call_settings(pipe), config.kv)
            if accelerator.is_main_process and config.kv and not getattr(pipe.config, "is_distilled", True):
                print(
                    f"{model} has guidance, which KV mode has not: the result is for its distilled sibling, and the "
                    "validation pictures are made without.",
                    file=sys.stderr,
                )
            result = finetune(
                host,
                Batches(samples, train_batch_size, config.seed, *sides.values()),
                Run(
                    output,
                    model or EMBEDDED,
                    str(Path(data).resolve()) if Path(data).exists() else data,  # the same from any folder
                    {"batch": train_batch_size, "samples": len(samples), "source": dict(source), **sides},
                    resume=resume is not None,
                ),
                config,
                accelerator=accelerator,
                encoding=Encoding(
                    workers=dataloader_num_workers,
                    latent_cache=Cache(folder / "latents", host.pipe.vae) if cache_latents else None,
                    text_cache=Cache(folder / "text", text_encoders(pipe), call_settings(host.pipe))
                    if cache_text
                    else None,
                ),
                watch=Watch(validation=shown, log=log, log_picture=log_picture),
            )
    except torch.OutOfMemoryError as error:
        raise ValueError(
            "The device's memory ran out: pass a smaller --resolution or --train-batch-size, or "
            "--gradient-checkpointing; resumed, the run goes on from its last checkpoint."
        ) from error
    accelerator.end_training()
    return result if accelerator.is_main_process else None


def _check_installed(report_to: str | None, *sources: str | None) -> None:
    """Raise ValueError that names all that is needed and not installed."""
    missing = []
    if report_to and importlib.util.find_spec("tensorboard") is None:
        missing.append("TensorBoard is not installed, which --report-to needs")
    named = [source for source in sources if source is not None and needs_datasets(source)]
    if named and importlib.util.find_spec("datasets") is None:
        missing.append(
            f"{'the' if missing else 'The'} datasets library is not installed, which reading {named[0]} needs"
        )
    if missing:
        raise ValueError(
            f"{', and '.join(missing)}: pip install 'sparse-context[train]', or leave --report-to out and "
            "pass a JSONL manifest."
        )


def text_encoders(pipe: Any) -> nn.ModuleList:
    """All that a pipeline reads prompts with, as one module: FLUX.1 has two."""
    parts = (pipe.components.get(name) for name in ("text_encoder", "text_encoder_2"))
    return nn.ModuleList(part for part in parts if isinstance(part, nn.Module))
