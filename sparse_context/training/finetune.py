"""Fine-tuning with dropped reference tokens, so that a model keeps its quality when it sees only some of them.

A step: encode a batch, draw which reference tokens it keeps (dropping.py), draw noise and noise levels, predict the
velocity, and compare on the output tokens only. What is trained is a LoRA or all weights of the transformer; with
distillation a share of the target is what the same weights say without the LoRA and with all tokens.

Output contract, in the folder of a run: loop.py's checkpoints and log, `config.json`, `validation/step-*.webp`, and at
the end `pytorch_lora_weights.safetensors` (or the folder `transformer/`) with a model card, `README.md`.
"""

import contextlib
import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

from .. import __version__
from ..families import family_of
from ..families.pictures import to_uint8
from ..generation import generate
from ..images import follow_folder, put_in_place, save_picture, save_text
from ..mini import WEIGHTS, read_call_settings
from ..preview import column, label, side_by_side
from ..selection import SparseContextConfig
from ..sparsify import remove_sparse_context
from ..tokens import ReferenceTokens
from .attention import MatmulAttention
from .data import Ahead, Cache, Example, fingerprint
from .dropping import Dropping, draw_selection
from .hosts import Host, Text
from .loop import (
    SCHEDULES,
    check_names,
    drawn_from,
    has_begun,
    make_optimisers,
    newest_step,
    not_written,
    remove,
    train,
)
from .lora import save_lora

LORA_FILE = "pytorch_lora_weights.safetensors"
RECORD_FILE = "sparse_context.json"  # beside all weights, what the metadata of a LoRA holds
EMBEDDED = "the embedded model"  # as the base of a run


@dataclass(frozen=True)
class FinetuneConfig:
    """How to fine-tune. Raises ValueError that names the field and its value.

    What is trained: a LoRA of `rank` and `lora_alpha` on `lora_layers` (module names or their endings; None: the host's
    own), or with `full` all weights of the transformer. `kv`: for pipelines that cache the references (hosts.py).

    The loss: `dropping` says which tokens batches keep; with `subsets` each batch is taken that many times, from one
    noise with other tokens; encoders and teacher run once for all. `caption_dropout` is the share of prompts emptied;
    `distillation` in [0, 1] is the share of the loss that compares with the dense prediction of the same weights
    without LoRA. With a `preservation` above 0, batches that keep all tokens compare with that alone, and count that
    many times: a target without noise holds what the model knew, and training on it anew would blur it. An output token
    inside a sample's `mask` counts 1 + `focus` times: as much as it did where the base was trained, or else the object
    loses what the background gains. One whose `source` is known and dropped counts `unseen` times as much as others,
    since it can only be guessed. Noise levels are logit-normal (Esser et al. 2024) or, with weighting_scheme "none",
    uniform, moved by `shift` (None: the scheduler's own).

    The optimiser: AdamW, or where `muon_learning_rate` is given Muon at that rate on the matrices inside the
    transformer's blocks and AdamW on the rest; `lr_scheduler` is a name of `loop.SCHEDULES`; `ema` is the decay of the
    weights' average, of which the result is made (0: of the last weights). A step is `gradient_accumulation_steps`
    batches, with all their subsets.
    """

    rank: int = 4
    lora_alpha: float = 4
    lora_layers: tuple[str, ...] | None = None
    full: bool = False
    kv: bool = False
    dropping: Dropping = field(default_factory=Dropping)
    subsets: int = 1
    caption_dropout: float = 0.0
    distillation: float = 0.0
    preservation: float = 0.0
    focus: float = 0.0
    unseen: float = 1.0
    weighting_scheme: str = "logit_normal"
    shift: float | None = None
    max_train_steps: int = 1000
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-4
    muon_learning_rate: float | None = None
    lr_scheduler: str = "constant"
    lr_warmup_steps: int = 100
    adam_weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    ema: float = 0.0
    gradient_checkpointing: bool = False
    seed: int = 0
    checkpointing_steps: int = 500
    checkpoints_total_limit: int = 2
    validation_steps: int = 0
    validation_keep: float = 0.2

    def __post_init__(self) -> None:
        for name in ("rank", "subsets", "max_train_steps", "gradient_accumulation_steps", "checkpointing_steps",
                     "checkpoints_total_limit"):  # fmt: skip
            if not getattr(self, name) >= 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}: pass a whole number, 1 or more.")
        if not self.seed < 2**63:
            raise ValueError(f"seed is {self.seed!r}: pass a whole number below 2**63.")
        for name in ("preservation", "focus", "lr_warmup_steps", "adam_weight_decay", "validation_steps", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)!r}: pass a number of 0 or more.")
        for name in ("caption_dropout", "distillation"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}: pass a share from 0 to 1.")
        if not 0 < self.unseen <= 1:
            raise ValueError(f"unseen is {self.unseen!r}: pass a share above 0 and up to 1.")
        for name in ("learning_rate", "muon_learning_rate", "lora_alpha", "max_grad_norm", "shift"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value!r}: pass a number above 0.")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema is {self.ema!r}: pass a decay from 0 up to, not including, 1.")
        if self.lr_scheduler not in SCHEDULES:
            raise ValueError(f"lr_scheduler is {self.lr_scheduler!r}: choose one of {', '.join(SCHEDULES)}.")
        if self.weighting_scheme not in ("logit_normal", "none"):
            raise ValueError(f"weighting_scheme is {self.weighting_scheme!r}: choose logit_normal or none.")
        for name in ("distillation", "preservation"):
            if self.full and getattr(self, name):
                raise ValueError(
                    f"{name} takes the weights without the LoRA as its teacher, and a full fine-tuning keeps no such "
                    "copy: leave one of the two out."
                )
        SparseContextConfig(keep=self.validation_keep)


# A step ---------------------------------------------------------------------------------------------------------------


class Prepared(NamedTuple):
    """A batch before any encoder saw it: what a thread or process makes ahead of the steps.

    prompts, seen: of each sample, what its text encoder gets. target: pixels (B, 3, H, W) in [-1, 1]. references: the
    same for each reference, of any sizes. pictures: for each reference, one array uint8 (H, W, 3 or 4) for each sample,
    as selectors want them. mask: the object's share of each output token, (B, tokens) in [0, 1]; 0 without a mask.
    source: the reference token that each shows, int64 (B, tokens), as in `Example`; -1 without one.
    """

    prompts: list[str]
    seen: list[tuple[Image.Image, ...]]
    target: torch.Tensor
    references: list[torch.Tensor]
    pictures: list[list[np.ndarray]]
    mask: torch.Tensor
    source: torch.Tensor

    def grids(self, token: int) -> list[tuple[int, int]]:
        """Rows and columns of tokens of each reference."""
        return [(pixels.shape[-2] // token, pixels.shape[-1] // token) for pixels in self.references]


def prepare_batch(host: Host, examples: Sequence[Example], prompts: Sequence[str]) -> Prepared:
    """Samples whose pictures have the same sizes, on the CPU. prompts: in the place of their own."""
    references, pictures = [], []
    for i in range(len(examples[0].references)):
        pixels = [host.pixels(example.references[i]) for example in examples]
        masks = [example.masks[i] for example in examples]
        shown = [to_uint8(one)[0] for one in pixels]
        if all(mask is not None for mask in masks):
            covered = [to_uint8(host.pixels(mask.convert("RGB")))[0][..., :1] for mask in masks if mask is not None]
            shown = [np.concatenate(pair, axis=-1) for pair in zip(shown, covered, strict=True)]
        references.append(torch.cat(pixels))
        pictures.append(shown)
    target = torch.cat([host.pixels(example.image) for example in examples])
    grid = target.shape[-2] // host.token, target.shape[-1] // host.token
    covers = [torch.zeros(1, 1, *grid) if example.mask is None
              else nn.functional.adaptive_avg_pool2d(host.pixels(example.mask.convert("RGB"))[:, :1] / 2 + 0.5, grid)
              for example in examples]  # fmt: skip
    seen = [example.references for example in examples]
    sources = [np.full(grid, -1) if example.source is None else example.source for example in examples]
    for source in sources:
        if source.shape != grid:
            raise ValueError(f"The sources of a sample are {source.shape} tokens, and its output has {grid}.")
    return Prepared(list(prompts), seen, target, references, pictures, torch.cat(covers).flatten(1),
                    torch.from_numpy(np.stack(sources)).flatten(1))  # fmt: skip


@dataclass(frozen=True)
class Encoded:
    """A batch as the transformer's surroundings see it.

    target: latents (B, C, rows, columns). references: the same for each reference, of any sizes. text: what the host
    made of it. mask, source: as in `Prepared`.
    """

    target: torch.Tensor
    references: list[torch.Tensor]
    text: Text
    mask: torch.Tensor
    source: torch.Tensor


def encode(host: Host, batch: Prepared, latent_cache: Cache | None = None, text_cache: Cache | None = None) -> Encoded:
    """Encode a batch, on the device of the transformer. With a cache, one by one, else all at once."""
    device = next(host.transformer.parameters()).device

    def latents(pixels: torch.Tensor) -> torch.Tensor:
        if latent_cache is None:
            return host.encode_pictures(pixels).to(device).float()
        made = [
            latent_cache.get(
                repr(tuple(one.shape)).encode() + one.numpy().tobytes(),
                lambda one=one: {"latents": host.encode_pictures(one)},  # type: ignore[misc]
            )["latents"]
            for one in pixels.split(1)
        ]
        return torch.cat(made).to(device).float()

    if text_cache is None:
        text = host.encode_text(batch.prompts, batch.seen)
    else:
        parts = []
        for prompt, pictures in zip(batch.prompts, batch.seen, strict=True):
            seen = pictures if host.text_sees_references else ()
            key = "\0".join([prompt, *map(str, (p.size for p in seen))]).encode()
            key += b"".join(picture.tobytes() for picture in seen)
            parts.append(
                text_cache.get(key, lambda p=prompt, s=seen: host.encode_text([p], [s]))  # type: ignore[misc]
            )
        text = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return Encoded(
        latents(batch.target),
        [latents(pixels) for pixels in batch.references],
        {name: tensor.to(device) for name, tensor in text.items()},
        batch.mask.to(device),
        batch.source.to(device),
    )


def noise_levels(u: torch.Tensor, scheme: str, shift: float) -> torch.Tensor:
    """Noise levels in (0, 1) from uniform numbers `u` in (0, 1): the quantiles of `scheme`, moved towards noise.

    "logit_normal" is the sigmoid of a standard normal (Esser et al. 2024), "none" is uniform. A `shift` of s moves
    sigma to s * sigma / (1 + (s - 1) * sigma), as the flow matching scheduler does.
    """
    sigma = torch.sigmoid(torch.special.ndtri(u)) if scheme == "logit_normal" else u
    return shift * sigma / (1 + (shift - 1) * sigma)


def add_noise(host: Host, encoded: Encoded, sigma: torch.Tensor, noise: torch.Tensor) -> ReferenceTokens:
    """The output tokens at the noise levels `sigma`, (B,)."""
    level = sigma.view(-1, 1, 1, 1)
    return host.target_tokens((1 - level) * encoded.target + level * noise)


@torch.no_grad()
def dense_answer(host: Host, encoded: Encoded, sigma: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """What the model without the adapter says with all reference tokens: the teacher's velocity (B, tokens, C)."""
    noisy = add_noise(host, encoded, sigma, noise)
    with without_adapter(host.transformer):
        references = host.reference_tokens(encoded.references)
        return host.velocity(noisy, sigma, encoded.text, references, teacher=True).float()


def flow_matching_loss(
    host: Host,
    encoded: Encoded,
    index: np.ndarray,
    sigma: torch.Tensor,
    noise: torch.Tensor,
    distillation: float = 0.0,
    focus: float = 0.0,
    preservation: float = 0.0,
    into: np.ndarray | None = None,
    teacher: torch.Tensor | None = None,
    unseen: float = 1.0,
) -> torch.Tensor:
    """Mean squared error of the velocity on the output tokens, with the reference tokens at `index` and no others.

    sigma: (B,). noise: as `encoded.target`. into: as in `ReferenceTokens.keep`. The velocity to be met is noise -
    target; a share `distillation` of the loss meets the dense prediction without the adapter instead. A token counts
    1 + `focus` * its `encoded.mask` times, and `unseen` times that if it has an `encoded.source` of which nothing is
    kept. Where `index` has all tokens and `preservation` is above 0, the loss is that times the mean squared distance
    to the dense prediction without the adapter, in which all tokens count the same. teacher: that prediction, from
    `dense_answer`, where it is there already.
    """
    weights = 1 + focus * encoded.mask
    if unseen < 1:  # else no copy to the device, which would wait for it
        present = torch.from_numpy(index if into is None else np.flatnonzero(into >= 0)).to(encoded.source.device)
        seen = (encoded.source < 0) | torch.isin(encoded.source, present)
        weights = weights * torch.where(seen, 1.0, unseen)
    wanted = host.target_tokens(noise - encoded.target).latents
    references = host.reference_tokens(encoded.references)
    preserves = preservation > 0 and len(index) == len(references)
    if teacher is None and (distillation or preserves):
        teacher = dense_answer(host, encoded, sigma, noise)
    kept = references.keep(index, into)
    velocity = host.velocity(add_noise(host, encoded, sigma, noise), sigma, encoded.text, kept).float()
    if teacher is not None and preserves:
        return preservation * (velocity - teacher).square().mean()
    error = (velocity - wanted).square().mean(-1)
    if teacher is not None and distillation:
        error = (1 - distillation) * error + distillation * (velocity - teacher).square().mean(-1)
    return (error * weights).sum() / weights.sum()


@contextlib.contextmanager
def without_adapter(transformer: Any) -> Iterator[None]:
    """The transformer as it was before the adapter."""
    transformer.disable_adapters()
    try:
        yield
    finally:
        transformer.enable_adapters()


Subset = tuple[np.ndarray, np.ndarray | None]  # kept tokens: `index` and `into` of a `Selection`


def make_loss(
    host: Host,
    batches: Callable[[int], list[Example]],
    config: FinetuneConfig,
    *,
    rank: int = 0,
    ranks: int = 1,
    workers: int = 0,
    autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    latent_cache: Cache | None = None,
    text_cache: Cache | None = None,
) -> Callable[[int], torch.Tensor]:
    """`loss(number)` for loop.py: subset number % subsets of batch number // subsets.

    That batch of process `rank` is batch * ranks + rank of the data. All that is random is drawn from (seed, batch,
    rank), and the sets from the subset as well, so processes draw different ratios, sets and noise. What needs no
    encoder is made ahead, in a thread or by `workers` processes; what the encoders and the teacher say of a batch is
    kept until the next one.
    """
    shift = host.shift if config.shift is None else config.shift
    device = next(host.transformer.parameters()).device
    plain = config.gradient_checkpointing or device.type != "cpu"

    def prepare(number: int) -> tuple[Prepared, list[Subset], int]:
        examples = batches(number * ranks + rank)
        rng = np.random.default_rng([config.seed, 2, number, rank])
        emptied = rng.random(len(examples)) < config.caption_dropout
        prompts = ["" if empty else example.prompt for empty, example in zip(emptied, examples, strict=True)]
        batch = prepare_batch(host, examples, prompts)
        seed = [config.seed, 3, number, rank]
        seeds = [seed, *([*seed, subset] for subset in range(1, config.subsets))]  # the first is as without others
        drawn = [draw_selection(config.dropping, batch.pictures, batch.grids(host.token), seed) for seed in seeds]
        subsets = [(selection.index, selection.into) for selection in drawn]
        return batch._replace(pictures=[]), subsets, int(rng.integers(2**62))

    ahead = Ahead(prepare, workers)

    @contextlib.contextmanager
    def forward() -> Iterator[None]:
        with autocast(), contextlib.nullcontext() if plain else MatmulAttention():
            yield

    @lru_cache(maxsize=1)
    def take(number: int) -> tuple[Encoded, list[Subset], torch.Tensor, torch.Tensor, torch.Tensor | None]:
        batch, subsets, seed = ahead(number)
        encoded = encode(host, batch, latent_cache, text_cache)
        generator = torch.Generator().manual_seed(seed)
        u = torch.rand(len(encoded.target), generator=generator).clamp(1e-4, 1 - 1e-4)
        sigma = noise_levels(u, config.weighting_scheme, shift).to(device)
        noise = torch.randn(encoded.target.shape, generator=generator).to(device)
        count = sum(rows * columns for rows, columns in batch.grids(host.token))
        preserves = config.preservation > 0 and any(len(index) == count for index, _ in subsets)
        teacher = None
        if config.distillation or preserves:
            with forward():
                teacher = dense_answer(host, encoded, sigma, noise)
        return encoded, subsets, sigma, noise, teacher

    def loss(number: int) -> torch.Tensor:
        encoded, subsets, sigma, noise, teacher = take(number // config.subsets)
        index, into = subsets[number % config.subsets]
        with forward():
            return flow_matching_loss(
                host, encoded, index, sigma, noise, config.distillation, config.focus, config.preservation, into=into,
                teacher=teacher, unseen=config.unseen,
            )  # fmt: skip

    return loss


# What is trained ------------------------------------------------------------------------------------------------------


class Trainable(nn.Module):
    """The weights of a module that are trained, and only those: the same `Parameter`s under their own names.

    So checkpoints, the average and what processes exchange hold an adapter of megabytes and not its base of gigabytes.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                self.register_parameter(name.replace(".", "/"), parameter)


def prepare(host: Host, config: FinetuneConfig) -> Trainable:
    """Put a fresh LoRA on the transformer, or open all its weights; what is trained is float32.

    Raises ValueError for layers that the transformer does not have.
    """
    transformer: Any = host.transformer
    transformer.requires_grad_(False)
    if config.full:
        transformer.float().requires_grad_(True)
    else:
        from peft import LoraConfig

        targets = list(config.lora_layers) if config.lora_layers else host.lora_targets()
        lora = LoraConfig(r=config.rank, lora_alpha=config.lora_alpha, init_lora_weights="gaussian",
                          target_modules=targets)  # fmt: skip
        try:
            for name in targets:  # those that peft finds nowhere it passes over, as long as it finds others
                if not name or not any(f".{layer}".endswith(f".{name}") for layer, _ in transformer.named_modules()):
                    raise ValueError(f"it has no {name!r}")
            with drawn_from(config.seed):
                transformer.add_adapter(lora)
        except ValueError as error:
            raise ValueError(
                f"lora_layers is {', '.join(targets)}, and the transformer takes no LoRA there "
                f"({' '.join(str(error).split())[:200].rstrip('.')}): name its linear layers, such as to_q,to_k,to_v."
            ) from error
        for parameter in transformer.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    transformer.train()
    return Trainable(transformer)


def _make_optimisers(transformer: nn.Module, trained: Trainable, config: FinetuneConfig) -> list[torch.optim.Optimizer]:
    decay = config.adam_weight_decay
    if config.muon_learning_rate is None:
        return [torch.optim.AdamW(trained.parameters(), lr=config.learning_rate, weight_decay=decay)]
    blocks = [f"{name}/" for name, child in transformer.named_children() if isinstance(child, nn.ModuleList)]
    return make_optimisers(trained, blocks, config.learning_rate, config.muon_learning_rate, decay)


@contextlib.contextmanager
def weights_of(average: nn.Module, trained: nn.Module) -> Iterator[None]:
    """The averaged weights in the place of the trained ones."""
    if average is trained:
        yield
        return
    own = copy.deepcopy(trained.state_dict())
    trained.load_state_dict(average.state_dict())
    try:
        yield
    finally:
        trained.load_state_dict(own)


# A run ----------------------------------------------------------------------------------------------------------------


def finetune(
    host: Host,
    batches: Callable[[int], list[Example]],
    output: Path,
    config: FinetuneConfig,
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
    record = {"base": base, "base_weights": fingerprint(host.transformer), "data": data, **sampling,
              "processes": ranks, "mixed_precision": precision, **asdict(config), "version": __version__}  # fmt: skip
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


def _as_text(host: Host) -> contextlib.AbstractContextManager:
    """Autocast to the text encoder's type where the transformer has another: a pipeline does not cast what it hands
    over, and `full` makes the transformer alone float32."""
    weight = next(host.transformer.parameters())
    encoder = next(host.pipe.text_encoder.parameters()).dtype
    return contextlib.nullcontext() if encoder == weight.dtype else torch.autocast(weight.device.type, encoder)


@contextlib.contextmanager
def _evaluating(transformer: nn.Module) -> Iterator[None]:
    transformer.eval()
    try:
        yield
    finally:
        transformer.train()


def check_folder(output: Path, resume: bool, steps: int) -> None:
    """Raise ValueError or OSError where a run of so many steps cannot begin, or cannot be continued, in `output`."""
    step = newest_step(output) if output.is_dir() else 0
    there = next(place for place in (output, *output.absolute().parents) if place.exists())
    if not there.is_dir():
        raise ValueError(f"The output {output} {'is' if there == output else 'lies below'} a file: name a folder.")
    check_names(output)
    if step and not resume:
        raise ValueError(
            f"The folder {output} holds a run at step {step}: continue it with --resume latest, or name another folder."
        )
    if step:
        read_record(output)  # now, and not after a model was loaded
    if step > steps:
        raise ValueError(
            f"The run in {output} is at step {step}, and max_train_steps is {steps}: pass at least as many, or name "
            "another folder."
        )
    if not step:
        foreign = [name for name in (LORA_FILE, "transformer", "README.md") if (output / name).exists()]
        own = (output / "config.json").exists()
        if own and "dropping" not in read_record(output):
            foreign.append("config.json")
        if not own:  # what a run that was killed before its first checkpoint leaves, it leaves beside one
            foreign += [
                path.name for name in ("log.jsonl", "validation", "step-*.partial") for path in output.glob(name)
            ]
        if foreign:
            raise ValueError(
                f"The folder {output} holds {foreign[0]} and no checkpoint, and a run would write over it: name "
                "another folder."
            )
    for name, kind in WRITTEN.items():
        if (output / name).exists() and (output / name).is_dir() != (kind == "folder"):
            raise ValueError(f"{output / name} is no {kind}, and a run writes one of that name: move it away.")


WRITTEN = {"config.json": "file", "log.jsonl": "file", "README.md": "file", LORA_FILE: "file", "transformer": "folder",
           "validation": "folder"}  # fmt: skip
"""What a run writes beside its checkpoints."""


SHEET_SIDE = 16_383
"""Pixels that a side of a validation picture may have, in webp. A larger one is scaled down, for no run ends by it."""

FREE = ("base", "max_train_steps", "checkpointing_steps", "checkpoints_total_limit", "validation_steps",
        "validation_keep", "gradient_checkpointing", "version")  # fmt: skip
"""What may change when a run is resumed: its length, and what does not decide its weights (the base is told by its own,
not by its name). So may a warm-up, where no step that is left tells."""


ALWAYS = {"base_weights": str, "data": str, "processes": int, "mixed_precision": str, "dropping": dict}
"""What every record of a run has, and of which kind it is. What came later and lacks there is the default."""


def _check_same(output: Path, record: dict, resume: bool) -> None:
    if not resume or not has_begun(output):
        return
    if not newest_step(output) and not (output / "config.json").exists():
        return  # the start that `loop.start_from` writes has seen no settings
    before = read_record(output)
    if not all(isinstance(before.get(name), kind) for name, kind in ALWAYS.items()):
        raise ValueError(f"{output / 'config.json'} is no record of a run: put the run's own back, or begin anew.")
    defaults = json.loads(json.dumps(asdict(FinetuneConfig())))  # of a run begun before a setting was there
    before = {name: before.get(name, defaults.get(name, record[name])) for name in record}
    before["dropping"] = defaults["dropping"] | before["dropping"]
    changed = [name for name in record if name not in FREE and record[name] != before[name]]
    if "lr_warmup_steps" in changed:
        rate, steps = SCHEDULES[record["lr_scheduler"]], record["max_train_steps"]
        left = range(newest_step(output), steps)
        if all(rate(step, steps, before["lr_warmup_steps"]) == rate(step, steps, record["lr_warmup_steps"])
               for step in left):  # fmt: skip
            changed.remove("lr_warmup_steps")
    if changed:
        says = "; ".join(f"{name} was {before.get(name)!r} and is now {record[name]!r}" for name in changed)
        raise ValueError(f"The run in {output} was started with other settings: {says}. Resume it with its own.")


def read_record(output: Path) -> dict:
    """The settings of the run in `output`; empty where its config.json is of something else. Raises ValueError where
    that is gone or damaged."""
    file = output / "config.json"
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"{file} cannot be read ({error.strerror}), so nothing tells whether the run goes on as it was begun: put "
            "it back, or name another folder."
        ) from error
    except ValueError as error:
        raise ValueError(f"{file} cannot be read, so the run cannot be continued as it was: {error}.") from error
    return record if isinstance(record, dict) else {}


def draw_validation(host: Host, examples: Sequence[Example], config: FinetuneConfig) -> Image.Image:
    """For each example one row: its references, the truth, the dense and the sparse output, from the same noise."""
    rows = []
    pipe = host.pipe
    quiet = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(disable=True)
    try:
        for example in examples:
            outputs = []
            for keep in (1.0, config.validation_keep):
                made = generate(pipe, example.references, example.prompt, SparseContextConfig(keep=keep),
                                height=example.image.height // host.token * host.token,
                                width=example.image.width // host.token * host.token)  # fmt: skip
                outputs.append(label(made.image, "all tokens" if keep == 1 else f"keep {keep:g}"))
            rows.append(side_by_side([*example.references, label(example.image, "truth"), *outputs]))
    finally:
        remove_sparse_context(pipe)
        pipe.set_progress_bar_config(**quiet)
    sheet = column(rows)
    sheet.thumbnail((SHEET_SIDE, SHEET_SIDE))
    return sheet


# The result -----------------------------------------------------------------------------------------------------------


def save_result(host: Host, result: Path, record: Mapping[str, Any], config: FinetuneConfig) -> None:
    """Write what was trained to `result`, whole or not at all, and a model card beside it."""
    transformer: Any = host.transformer
    partial = result.parent / "result.partial"
    try:
        remove(partial)
        if config.full:
            transformer.save_pretrained(partial)
            save_text(json.dumps(training_record(record), indent=2) + "\n", partial / RECORD_FILE)
            follow_folder(partial)
            remove(result)
            put_in_place(partial, result)
        else:
            from diffusers.training_utils import _collate_lora_metadata
            from peft import get_peft_model_state_dict

            host.pipe.save_lora_weights(
                partial,
                transformer_lora_layers=get_peft_model_state_dict(transformer),
                weight_name=LORA_FILE,
                safe_serialization=True,
                **_collate_lora_metadata({"transformer": transformer}),
            )
            with safe_open(partial / LORA_FILE, framework="pt") as file:
                metadata = (file.metadata() or {}) | {"sparse_context": json.dumps(training_record(record))}
            save_lora(load_file(partial / LORA_FILE), partial / "whole", metadata)
            follow_folder(partial / "whole")
            put_in_place(partial / "whole", result)
    except Exception as error:  # the libraries that write raise many kinds
        raise not_written(result, error) from error
    finally:
        with contextlib.suppress(OSError):
            remove(partial)
    save_text(model_card(record, host.pipe, transformer), result.parent / "README.md")


def training_record(record: Mapping[str, Any]) -> dict:
    """What a result says of its training, of the record of its run with its `steps`."""
    dropping = record["dropping"]
    return {
        "base": record["base"],
        "base_weights": record["base_weights"],
        "steps": record["steps"],
        "keep": [dropping["keep_min"], dropping["keep_max"]],
        "dense": dropping["dense"],
        "mix": dropping["mix"],
        "coverage": dropping["coverage"],
        "merge": dropping["merge"],
        "subsets": record["subsets"],
        "distillation": record["distillation"],
        "preservation": record["preservation"],
        "unseen": record["unseen"],
        "kv": record["kv"],
        "version": record["version"],
    }


def model_card(record: Mapping[str, Any], pipe: Any, transformer: Any) -> str:
    """The README.md of a result, with the front matter that the hub reads; its code loads it in plain diffusers."""
    pipeline, architecture = type(pipe).__name__, type(transformer).__name__
    dropping, full = record["dropping"], record["full"]
    mix = ", ".join(f"{kind} {share:g}" for kind, share in dropping["mix"].items() if share)
    what = "all weights" if full else f"LoRA of rank {record['rank']}, alpha {record['lora_alpha']:g}"
    base, data = str(record["base"]), str(record["data"])
    own = base == EMBEDDED
    local = not own and Path(base).exists()  # a folder of this machine says nothing to others
    shown = "WEIGHTS" if own else json.dumps(f"path/to/{Path(base).name}" if local else base)
    hub = "" if own or local else f"base_model: {json.dumps(base)}\n"
    trained = f'{architecture}.from_pretrained("transformer", dtype=torch.bfloat16)'
    if family_of(pipe).modular:
        load = f"pipe = {pipeline}.from_pretrained({shown})\npipe.load_components(dtype=torch.bfloat16)"
        load += f"\npipe.update_components(transformer={trained})" if full else ""
    elif full:
        load = f"pipe = {pipeline}.from_pretrained({shown}, transformer={trained}, dtype=torch.bfloat16)"
    else:
        load = f"pipe = {pipeline}.from_pretrained({shown}, dtype=torch.bfloat16)"
    if not full:
        load += f'\npipe.load_lora_weights(".", weight_name="{LORA_FILE}", use_safetensors=True)'
    weights = "\nfrom sparse_context.mini import WEIGHTS" if own else ""
    call = ""
    if own:
        settings = read_call_settings(WEIGHTS) or {}
        wanted = ("height", "width", "num_inference_steps", "max_sequence_length", "text_encoder_out_layers")
        given = ", ".join(f"{name}={settings[name]!r}" for name in wanted if name in settings)
        call = f'\nimage = pipe(image=[...], prompt="...", {given}).images[0]'
    imports = f"{f'{architecture}, ' if full else ''}{pipeline}"
    tags = "\n".join(f"- {tag}" for tag in ("diffusers", "diffusers-training", *([] if full else ["lora"]),
                                            "image-to-image", "sparse-context"))  # fmt: skip
    muon = "" if record["muon_learning_rate"] is None else f", of Muon {record['muon_learning_rate']:g}"
    kv = "\n| KV mode | yes: for pipelines that cache the references |" if record["kv"] else ""
    return f"""---
{hub}library_name: diffusers
pipeline_tag: image-to-image
tags:
{tags}
---

# Trained for dropped reference tokens

{what[0].upper() + what[1:]} of {base if own else shown}, fine-tuned with a part of the reference tokens dropped, by
[Sparse Context](https://arxiv.org/abs/2606.23682)'s method, so that the model keeps its quality when it sees only some.

```python
import torch
from diffusers import {imports}
from sparse_context import apply_sparse_context{weights}

{load}
apply_sparse_context(pipe, keep=0.2){call}
```

| setting | value |
|---|---|
| steps | {record["steps"]}, {record["gradient_accumulation_steps"]} batches each on {record["processes"]} processes |
| data | `{Path(data).name if Path(data).exists() else data}` |
| tokens kept | {dropping["keep_min"]:g} to {dropping["keep_max"]:g} of each reference, log-uniform |
| batches with all tokens | {dropping["dense"]:g} |
| sets of tokens for each batch | {record["subsets"]} |
| drop mix | {mix} |
| evenly spread share | one of {", ".join(f"{c:g}" for c in dropping["coverage"])} |
| share of averages | one of {", ".join(f"{c:g}" for c in dropping["merge"])} |
| learning rate | {record["learning_rate"]:g}{muon}, {record["lr_scheduler"]} |
| distillation | {record["distillation"]:g} |
| preservation | {record["preservation"]:g} |
| weight of the object | {1 + record["focus"]:g} times |
| weight of what was dropped | {record["unseen"]:g} times, where it is known |{kv}

Made with sparse-context {record["version"]}. Quality was not measured by this training; see `sparse-context evaluate`.
The base model's licence applies.
"""
