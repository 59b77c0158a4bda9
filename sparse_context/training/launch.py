"""A run from options: what `sparse-context train` and `accelerate launch -m sparse_context.training` do."""

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import nn

from ..families import FAMILIES, find_host
from ..families.host import Host
from ..pipelines.embedded import WEIGHTS
from ..pipelines.hub import class_name_of
from ..pipelines.load import load
from ..pipelines.lora_file import NO_LORA
from ..pipelines.settings import call_settings, most_references
from ..pipelines.spec import ModelSpec
from ..samples import Samples, check_pictures, needs_datasets, read_samples
from .batch import Encoding, is_wide, text_encoders
from .cache import Cache
from .card import EMBEDDED
from .checkpoints import has_begun, newest_step
from .config import TrainConfig
from .data import Batches, Example, check_workers, open_example
from .encoders import TEXT_ENCODERS, Prompts, fill_caches
from .files import alone
from .finetune import Run, Watch, finetune, lay_out_channels_last
from .optimisers import check_8bit_adam
from .options import RunConfig
from .precision import has_fast_bfloat16
from .processes import Processes
from .run_folder import check_folder
from .sharding import is_asked_for
from .together import meet_anew, together


def launch(
    model: str | None, data: str, output: Path, config: TrainConfig, run: RunConfig, *, resume: str | None = None
) -> Path | None:
    """Load, train, write. Returns the path of the result, on the main process; None on the others.

    model: a hub id or a folder; None is the embedded model. data: a manifest, a folder of a data set or a hub name.
    resume: "latest" continues the run in `output`. Everything that can be wrong with the options is found before a
    model is loaded. Raises ValueError and OSError in one sentence.
    """
    if resume not in (None, "latest"):
        raise ValueError(f"resume is {resume!r}: pass latest, or leave it out to start anew.")
    check_folder(output, resume is not None, config.max_train_steps)
    samples, shown, spec = open_data(model, data, config, run)

    import torch

    accelerator = start_accelerator(run, output)
    config = replace(config, fsdp=config.fsdp or is_asked_for(accelerator))
    check_base(config, run)

    def trackers() -> list[Any]:
        if run.report_to and not accelerator.trackers:  # at the first record, for what is refused writes nothing
            accelerator.init_trackers(run.report_to)
        return accelerator.trackers

    def log(step: int, record: Mapping[str, float]) -> None:
        for tracker in trackers():
            tracker.log({name: value for name, value in record.items() if name != "step"}, step=step)

    def log_picture(step: int, picture: Image.Image) -> None:
        for tracker in trackers():
            tracker.writer.add_image("validation", np.asarray(picture), step, dataformats="HWC")

    spec = replace(spec, device=str(accelerator.device))
    batches = Batches(samples, run.train_batch_size, config.seed, *run.sides.values())
    holding = alone(output) if accelerator.is_main_process else contextlib.nullcontext()
    with together(accelerator), enough_memory(), holding:
        for note in samples.notes if accelerator.is_main_process else ():
            print(note, file=sys.stderr)
        if accelerator.is_main_process and resume and not has_begun(output):
            print(f"{output} holds no checkpoint, so the run starts anew.", file=sys.stderr)
        host, encoding = make_host(model, spec, batches, shown, output, config, run, accelerator)
        narrow = accelerator.mixed_precision == "bf16" or host.transformer.dtype == torch.bfloat16
        if accelerator.is_main_process and narrow and not has_fast_bfloat16(accelerator.device):
            print(
                "This CPU has no instructions for bfloat16, so a step takes many times as long as in float32: pass "
                "mixed_precision=no and dtype=float32.",
                file=sys.stderr,
            )
        result = finetune(
            host,
            batches,
            Run(
                output,
                model or EMBEDDED,
                str(Path(data).resolve()) if os.path.exists(data) else data,  # the same from any folder
                {
                    "batch": run.train_batch_size,
                    "samples": len(samples),
                    "source": run.source,
                    "quantization": run.quantization,
                    "run": asdict(run) | {"cache_dir": None if run.cache_dir is None else str(run.cache_dir)},
                    **run.sides,
                },
                resume=resume is not None,
            ),
            config,
            accelerator=accelerator,
            encoding=encoding,
            watch=Watch(validation=shown, log=log, log_picture=log_picture),
        )
    accelerator.end_training()
    return result if accelerator.is_main_process else None


@contextlib.contextmanager
def enough_memory() -> Iterator[None]:
    """What is said where the device's memory runs out."""
    from ..pipelines.errors import TooLargeError
    from ..pipelines.memory import is_out_of_memory

    try:
        yield
    except TooLargeError as error:
        raise ValueError(
            "The model does not fit into the device's memory: set quantization=int8 or nf4, cache_latents=true and "
            "cache_text=true, or choose a smaller model."
        ) from error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ValueError(
            "The device's memory ran out: set gradient_checkpointing=true, with which a run that has begun may be "
            "resumed, or begin a new one with a smaller resolution or train_batch_size."
        ) from error


def open_data(
    model: str | None, data: str, config: TrainConfig, run: RunConfig
) -> tuple[Samples, list[Example], ModelSpec]:
    """The samples, the examples of validation pictures, and what is to be loaded. Raises what `launch` raises for
    options and data that are wrong."""
    _check_installed(run.report_to, data, run.validation_data)
    check_workers(run.dataloader_num_workers)
    check_base(config, run)
    most = most_references(model)
    spec = ModelSpec(model, dtype=run.dtype, lora=NO_LORA, quantization=run.quantization)
    samples = read_samples(data, most_references=most, **run.source)
    held_out = []
    if run.validation_data is not None:
        source = run.source if run.validation_split is None else {**run.source, "split": run.validation_split}
        held_out = read_samples(run.validation_data, most_references=most, **source)[: run.num_validation_images]
    resolution, reference_resolution = run.sides.values()
    shown = [open_example(sample, resolution, reference_resolution) for sample in held_out]
    check_pictures(samples)
    if config.teach and samples.aligned is False:
        raise ValueError(
            f'teach is {config.teach!r}, but no row of {data} says where heads are to look: write "aligned": true in '
            "rows whose image keeps the layout of its first reference, or leave teach and teach_heads out."
        )
    return samples, shown, spec


def start_accelerator(run: RunConfig, output: Path) -> Any:
    """accelerate's account of the processes of a run, with its mixed precision. Raises ValueError for fp16, and where
    accelerate does not know of all processes."""
    import torch
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    mixed_precision = run.mixed_precision
    if mixed_precision is None and "ACCELERATE_MIXED_PRECISION" not in os.environ:  # which accelerate launch sets
        mixed_precision = "bf16" if torch.accelerator.is_available() else "no"
    meet_anew()
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # else each of several is a run of its own to it
        mixed_precision=mixed_precision,
        log_with=run.report_to,
        project_dir=output,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],  # others wait while one validates
    )
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ValueError(f"mixed_precision is {accelerator.mixed_precision!r}: choose no or bf16.")
    started = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != started:  # as each would be a run of its own, in the same folder
        raise ValueError(
            f"{started} processes were started, and accelerate knows of {accelerator.num_processes}: start them by "
            "accelerate launch or torchrun, from one config."
        )
    return accelerator


def make_host(
    model: str | None,
    spec: ModelSpec,
    batches: Batches,
    shown: Sequence[Example],
    output: Path,
    config: TrainConfig,
    run: RunConfig,
    accelerator: Any,
) -> tuple[Host, Encoding]:
    """What is trained, loaded, and how its batches are made ready; where caches say so the encoders come first."""
    prompts = None
    if encodes_first(model, run):
        encoding, prompts = _encode_first(spec, batches, shown, output, config, run, accelerator)
        pipe = _load(spec, config, accelerator, leave_out=TEXT_ENCODERS)
        if not shown:  # which alone would decode
            pipe.vae = None
    else:
        pipe = _load(spec, config, accelerator)
        encoding = _encoding(pipe, output, run, accelerator)
    if accelerator.is_main_process and config.kv and not getattr(pipe.config, "is_distilled", True):
        print(
            f"{model} has guidance, which KV mode has not: the result is for its distilled sibling, and the "
            "validation pictures are made without.",
            file=sys.stderr,
        )
    host = find_host(pipe, call_settings(pipe), config.kv)
    if prompts is not None:
        prompts.recall(host.pipe)
    return host, encoding


def _load(spec: ModelSpec, config: TrainConfig, accelerator: Any, leave_out: Sequence[str] = ()) -> Any:
    """A pipeline; with weights to be sharded, its transformer stays on the CPU until each process takes its part."""
    if not Processes(accelerator, config.fsdp).sharded:
        return load(spec, leave_out)
    pipe = load(replace(spec, device="cpu"), leave_out)
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module) and name != "transformer":
            part.to(spec.device)
    return pipe


def _encoding(pipe: Any, output: Path, run: RunConfig, accelerator: Any) -> Encoding:
    """How batches are made ready, with the caches of the pipeline's encoders."""

    def cache(name: str, encoder: nn.Module, settings: Mapping[str, Any] | None = None) -> Cache:
        narrow = accelerator.mixed_precision != "no" and is_wide(encoder)
        precision = {"mixed_precision": accelerator.mixed_precision} if narrow else {}
        return Cache((run.cache_dir or output / "cache") / name, encoder, {**(settings or {}), **precision})

    return Encoding(
        workers=run.dataloader_num_workers,
        latent_cache=cache("latents", pipe.vae) if run.cache_latents else None,
        text_cache=cache("text", text_encoders(pipe), call_settings(pipe)) if run.cache_text else None,
    )


def encodes_first(model: str | None, run: RunConfig) -> bool:
    """Whether all that encoders make is on disk before the transformer is loaded.

    Modular pipelines and `Flux2KleinKVPipeline` are not built without a transformer, so theirs stay beside it.
    """
    if not (run.cache_latents and run.cache_text):
        return False
    family = FAMILIES[class_name_of(str(WEIGHTS) if model is None else model)]
    return not (family.modular or family.kv)


def _encode_first(
    spec: ModelSpec,
    batches: Batches,
    shown: Sequence[Example],
    output: Path,
    config: TrainConfig,
    run: RunConfig,
    accelerator: Any,
) -> tuple[Encoding, Prompts]:
    """Fill the caches for the batches to come, with the encoders alone; what is loaded for it is let go."""
    from accelerate.utils.memory import clear_device_cache

    processes = Processes(accelerator, config.fsdp)
    pipe = load(replace(spec, quantization=None), leave_out=("transformer",))
    host = find_host(pipe, call_settings(pipe))
    if accelerator.device.type == "cpu":
        lay_out_channels_last(pipe.vae)
    encoding, prompts = _encoding(pipe, output, run, accelerator), Prompts()
    each = config.gradient_accumulation_steps * processes.count
    taken = batches.taken(newest_step(output) * each, config.max_train_steps * each)[processes.rank :: processes.count]
    examples = map(batches.example, taken)
    fill_caches(host, examples, len(taken), config, encoding, accelerator.autocast, processes.main)
    if processes.main or processes.sharded:  # who draws validation pictures
        prompts.remember(pipe, shown, accelerator.autocast)
    del pipe, host
    clear_device_cache(garbage_collection=True)
    processes.wait()
    return encoding, prompts


def check_base(config: TrainConfig, run: RunConfig) -> None:
    """Raise ValueError where the frozen weights, what is trained and its optimiser do not go together."""
    if config.full and run.quantization is not None:
        raise ValueError(
            f"full trains all weights, and quantization={run.quantization} stores them in too few bits for that: leave "
            "one of the two out."
        )
    if config.compile and run.quantization is not None:
        raise ValueError(
            f"compile is True and quantization is {run.quantization!r}, which are not compiled here: leave one of the "
            "two out."
        )
    if config.fsdp and run.quantization is not None:
        raise ValueError(
            f"fsdp is True and quantization is {run.quantization!r}, whose weights cannot be parted: leave one of the "
            "two out."
        )
    if config.use_8bit_adam:
        check_8bit_adam()


def _check_installed(report_to: str | None, *sources: str | None) -> None:
    """Raise ValueError that names all that is needed and not installed."""
    missing = []
    if report_to and importlib.util.find_spec("tensorboard") is None:
        missing.append("TensorBoard is not installed, which report_to needs")
    named = [source for source in sources if source is not None and needs_datasets(source)]
    if named and importlib.util.find_spec("datasets") is None:
        missing.append(
            f"{'the' if missing else 'The'} datasets library is not installed, which reading {named[0]} needs"
        )
    if missing:
        raise ValueError(
            f"{', and '.join(missing)}: pip install 'sparse-context[train]', or leave report_to out and "
            "pass a JSONL manifest."
        )
