"""Fine-tuning with dropped reference tokens, so that a model keeps its quality when it sees only some of them.

A step: encode a batch, draw which reference tokens it keeps (dropping.py), draw noise and noise levels, predict the
velocity, and compare on the output tokens only. What is trained is a LoRA or all weights of the transformer; with
distillation a share of the target is what the same weights say without the LoRA and with all tokens.

Output contract, in the folder of a run: loop.py's checkpoints and log, `config.json`, `validation/step-*.webp`, and at
the end `pytorch_lora_weights.safetensors` (or the folder `transformer/`) with a model card, `README.md`.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from .. import __version__
from ..families.host import Host
from ..images import save_picture, save_text
from ..pipelines.errors import GenerationError
from ..trained import note_trained
from .batch import Autocast, Encoding
from .cache import fingerprint
from .checkpoints import newest_step
from .compiled import compiled_blocks
from .config import TrainConfig
from .data import Example
from .export import LORA_FILE, save_result, text_autocast
from .files import reason
from .loop import LoopConfig, train
from .loss import FlowMatching
from .processes import Processes
from .run_folder import check_folder, check_same
from .trainable import ADAPTER, Trainable, prepare, run_optimisers, weights_of
from .validation import draw_validation, evaluating


@dataclass(frozen=True)
class Run:
    """Where a run writes, and what its record says beside the config.

    base, data: of what is trained, and on what. sampling: whatever else says how batches are drawn; all of it must be
    the same when the run is resumed. resume: whether the run goes on from the newest checkpoint in `output`; without
    it a folder that holds one is refused, and with it so are other settings and base weights than those of the run.
    """

    output: Path
    base: str
    data: str
    sampling: Mapping[str, Any] = field(default_factory=dict)
    resume: bool = False


@dataclass(frozen=True)
class Watch:
    """What is seen of a run on its way.

    validation: examples that pictures are drawn of. log(step, record), log_picture(step, picture): beside what the
    folder gets, with a record every `log_every` steps.
    """

    validation: Sequence[Example] = ()
    log: Callable[[int, dict], None] | None = None
    log_picture: Callable[[int, Image.Image], None] | None = None
    log_every: int = 10


@dataclass(frozen=True)
class Limits:
    """How many seconds a run has, as in `loop.LoopConfig`."""

    stop_after: float | None = None
    seconds: float | None = None


def finetune(
    host: Host,
    batches: Callable[[int], list[Example]],
    run: Run,
    config: TrainConfig,
    *,
    accelerator: Any = None,
    encoding: Encoding | None = None,
    watch: Watch | None = None,
    limits: Limits | None = None,
) -> Path:
    """Train and write the result; returns the path of the LoRA, or of the transformer's folder.

    batches: (number) -> the examples of a batch. accelerator: an `accelerate.Accelerator`, or None for one plain
    process. Raises ValueError and OSError in one sentence.
    """
    processes, watch = Processes(accelerator, config.fsdp), watch or Watch()
    check_folder(run.output, run.resume, config.max_train_steps)
    record = _record(host, run, config, accelerator)
    check_same(run.output, record, run.resume)
    processes.agree_on_base(record["base_weights"])
    trained = prepare(host, config, accelerator.device if processes.sharded else None)
    note_trained(host.transformer, config.dropping.trained(host.kv), None if config.full else ADAPTER)
    if processes.main:
        run.output.mkdir(parents=True, exist_ok=True)
        save_text(json.dumps(record, indent=2) + "\n", run.output / "config.json")
    if host.transformer.device.type == "cpu" and host.pipe.vae is not None:
        lay_out_channels_last(host.pipe.vae)
    autocast = contextlib.nullcontext if accelerator is None else accelerator.autocast
    with fast(host.transformer, config, record["mixed_precision"]):
        average = train(
            trained,
            run_optimisers(host.transformer, trained, config),
            FlowMatching(host, batches, config, processes=processes, encoding=encoding, autocast=autocast),
            run.output,
            _loop_config(config, watch, limits or Limits()),
            accelerator=accelerator,
            show=_sheets(host, trained, run, config, watch, autocast, processes) if watch.validation else None,
            log=watch.log,
        )
    result = run.output / ("transformer" if config.full else LORA_FILE)
    if processes.main or processes.sharded:
        with weights_of(average, trained):
            save_result(host, result, record | {"steps": newest_step(run.output)}, config, processes)
    return result


def lay_out_channels_last(vae: nn.Module) -> None:
    """Give convolutions the layout in which a CPU computes them: else it lays out their inputs anew each time."""
    for layer in vae.modules():
        if isinstance(layer, nn.Conv2d):
            layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


@contextlib.contextmanager
def fast(transformer: nn.Module, config: TrainConfig, mixed_precision: str) -> Iterator[None]:
    """What makes the steps of a run faster, around all of them: a second forward of gradient checkpointing is among
    them, and has to be as the first."""
    from peft.helpers import disable_input_dtype_casting

    with contextlib.ExitStack() as stack:
        if mixed_precision != "no":
            # An adapter, whose weights are float32, makes its inputs so, and autocast makes them as they were
            stack.enter_context(disable_input_dtype_casting(transformer))
        if config.compile:
            stack.enter_context(compiled_blocks(transformer))
        yield


def _record(host: Host, run: Run, config: TrainConfig, accelerator: Any) -> dict[str, Any]:
    """What config.json holds: all that decides where the run ends."""
    record = {
        "base": run.base,
        "base_weights": fingerprint(host.transformer),
        "data": run.data,
        **run.sampling,
        "processes": Processes(accelerator).count,
        "mixed_precision": "no" if accelerator is None else accelerator.mixed_precision,
        **asdict(config),
        "kv": host.kv,
        "version": __version__,
    }
    return json.loads(json.dumps(record))


def _loop_config(config: TrainConfig, watch: Watch, limits: Limits) -> LoopConfig:
    return LoopConfig(
        steps=config.max_train_steps,
        warmup=config.lr_warmup_steps,
        schedule=config.lr_scheduler,
        ema=config.ema,
        clip=config.max_grad_norm,
        accumulate=config.gradient_accumulation_steps * config.subsets,
        log_every=watch.log_every,
        save_every=config.checkpointing_steps,
        keep_last=config.checkpoints_total_limit,
        show_every=config.validation_steps or config.max_train_steps,  # 0: after the last alone
        stop_after=limits.stop_after,
        seconds=limits.seconds,
    )


def _sheets(
    host: Host,
    trained: Trainable,
    run: Run,
    config: TrainConfig,
    watch: Watch,
    autocast: Autocast,
    processes: Processes,
) -> Callable[[int, nn.Module], None]:
    """(step, average) -> None: draws the validation pictures of a step; with sharded weights in all processes, of which
    the main one writes them."""

    def show(step: int, average: nn.Module) -> None:
        sheet = None
        try:
            with weights_of(average, trained), evaluating(host.transformer), autocast(), text_autocast(host):
                sheet = draw_validation(host, watch.validation, config)
            if not processes.main:
                return
            folder = run.output / "validation"
            folder.mkdir(exist_ok=True)
            save_picture(sheet, folder / f"step-{step:07d}.webp")
        except (ValueError, GenerationError, OSError) as error:
            if processes.sharded and sheet is None:  # the others may wait for this one in the midst of a picture
                raise ValueError(
                    f"The validation pictures of step {step} could not be drawn ({reason(error)}), and with fsdp all "
                    "processes draw them together: leave validation_data out, and resume."
                ) from error
            # Such as memory that suffices for training alone, or a picture that is open in a viewer on Windows: no run
            # ends by its pictures
            return tqdm.write(f"No validation pictures at step {step}: {error}")
        if watch.log_picture is not None:
            watch.log_picture(step, sheet)

    return show
