"""Fine-tuning with dropped reference tokens, so that a model keeps its quality when it sees only some of them.

A step: encode a batch, draw which reference tokens it keeps (dropping.py), draw noise and noise levels, predict the
velocity, and compare on the output tokens only. What is trained is a LoRA or all weights of the transformer; with
distillation a share of the target is what the same weights say without the LoRA and with all tokens.

Output contract, in the folder of a run: loop.py's checkpoints and log, `config.json`, `validation/step-*.webp`, and at
the end `pytorch_lora_weights.safetensors` (or the folder `transformer/`) with a model card, `README.md`.
"""

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn
from tqdm import tqdm

from .. import __version__
from ..families.host import Host
from ..images import save_picture, save_text
from .cache import Cache, fingerprint
from .checkpoints import newest_step
from .config import TrainConfig
from .data import Example
from .export import LORA_FILE, _as_text, save_result
from .loop import train
from .loss import make_loss
from .run_folder import _check_same, check_folder
from .trainable import _make_optimisers, prepare, weights_of
from .validation import _evaluating, draw_validation


def finetune(
    host: Host,
    batches: Callable[[int], list[Example]],
    output: Path,
    config: TrainConfig,
    *,
    base: str,
    data: str,
    accelerator: Any = None,
    resume: bool = False,
    validation: Sequence[Example] = (),
    latent_cache: Cache | None = None,
    text_cache: Cache | None = None,
    workers: int = 0,
    stop_after: float | None = None,
    seconds: float | None = None,
    log: Callable[[int, dict], None] | None = None,
    log_picture: Callable[[int, Image.Image], None] | None = None,
    log_every: int = 10,
    **sampling: Any,
) -> Path:
    """Train and write the result; returns the path of the LoRA, or of the transformer's folder.

    base, data, sampling: for the record; what says how `batches` draws must be the same when resumed. accelerator: an
    `accelerate.Accelerator`, or None for one plain process. workers: as in `make_loss`. stop_after, seconds: as in
    `loop.train`. `resume` continues from the newest checkpoint in `output`; without it a folder that holds one is
    refused, and with it so are other settings and base weights than those of the run. Raises ValueError and OSError in
    one sentence.
    """
    main = accelerator is None or accelerator.is_main_process
    ranks = 1 if accelerator is None else accelerator.num_processes
    check_folder(output, resume, config.max_train_steps)
    precision = "no" if accelerator is None else accelerator.mixed_precision
    record = {
        "base": base,
        "base_weights": fingerprint(host.transformer),
        "data": data,
        **sampling,
        "processes": ranks,
        "mixed_precision": precision,
        **asdict(config),
        "version": __version__,
    }
    record = json.loads(json.dumps(record))
    _check_same(output, record, resume)
    trained = prepare(host, config)
    if main:
        output.mkdir(parents=True, exist_ok=True)
        save_text(json.dumps(record, indent=2) + "\n", output / "config.json")
    optimisers = _make_optimisers(host.transformer, trained, config)

    def show(step: int, average: nn.Module) -> None:
        try:
            with weights_of(average, trained), _evaluating(host.transformer), _autocast(accelerator)(), _as_text(host):
                sheet = draw_validation(host, validation, config)
            folder = output / "validation"
            folder.mkdir(exist_ok=True)
            save_picture(sheet, folder / f"step-{step:07d}.webp")
        except (ValueError, OSError) as error:
            # Such as memory that suffices for training alone, or a picture that is open in a viewer on Windows: no run
            # ends by its pictures
            return tqdm.write(f"No validation pictures at step {step}: {error}")
        if log_picture is not None:
            log_picture(step, sheet)

    loss = make_loss(
        host,
        batches,
        config,
        rank=0 if accelerator is None else accelerator.process_index,
        ranks=ranks,
        workers=workers,
        autocast=_autocast(accelerator),
        latent_cache=latent_cache,
        text_cache=text_cache,
    )
    average = train(
        trained,
        optimisers,
        loss,
        output,
        steps=config.max_train_steps,
        warmup=config.lr_warmup_steps,
        schedule=config.lr_scheduler,
        ema=config.ema,
        clip=config.max_grad_norm,
        accumulate=config.gradient_accumulation_steps * config.subsets,
        accelerator=accelerator,
        log_every=log_every,
        save_every=config.checkpointing_steps,
        keep_last=config.checkpoints_total_limit,
        show=show if validation else None,
        show_every=config.validation_steps or config.max_train_steps,  # 0: after the last alone
        log=log,
        stop_after=stop_after,
        seconds=seconds,
    )
    result = output / ("transformer" if config.full else LORA_FILE)
    if main:
        with weights_of(average, trained):
            save_result(host, result, record | {"steps": newest_step(output)}, config)
    return result


def _autocast(accelerator: Any) -> Callable[[], contextlib.AbstractContextManager]:
    return contextlib.nullcontext if accelerator is None else accelerator.autocast
