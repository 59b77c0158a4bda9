"""How the embedded model is trained: the VAE, then the base (transformer and text encoder, on all reference tokens).

Every step resumes where it was killed. The working folder (ignored by git) holds the assets, the checkpoints, the logs
and sample sheets; `export` writes what is shipped.
"""

import contextlib
import copy
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import Qwen2Tokenizer

from ..generation import load_pipeline
from ..images import put_in_place, save_text
from ..training.attention import MatmulAttention
from ..training.data import Ahead, fingerprint
from ..training.finetune import noise_levels, read_record
from ..training.loop import drawn_from, load_average, make_optimisers, newest_step, start_from, train
from . import ADAPTERS, adapter_record
from .data import Assets, load_assets
from .model import (
    TEXT_LAYERS,
    TEXT_LENGTH,
    encode_pictures,
    make_pipeline,
    make_text_encoder,
    make_tokenizer,
    make_transformer,
    make_vae,
)
from .samples import tasks_of
from .scenes import EDITS, FAR, REFERENCE, SIZE, TASKS, TOKEN, Scene, draw_scene, make_scene


@dataclass(frozen=True)
class VaeConfig:
    """steps of `batch` crops of `crop` pixels, a multiple of 4; AdamW at `lr`. Raises ValueError for another."""

    steps: int = 2600
    batch: int = 16
    crop: int = 64
    lr: float = 1.5e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.crop % 4:
            raise ValueError(f"crop is {self.crop!r}: pass a multiple of 4, by which the VAE divides.")


def default_device() -> torch.device:
    """The accelerator where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def to_tensor(pictures: list[np.ndarray]) -> torch.Tensor:
    """uint8 (H, W, 3) pictures -> float32 (B, 3, H, W) in [-1, 1]."""
    return to_unit(torch.from_numpy(np.stack(pictures)))


def to_unit(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1]."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


def _crops(assets: Assets, config: VaeConfig, step: int) -> torch.Tensor:
    """uint8 (batch, crop, crop, 3)."""
    rng = np.random.default_rng([config.seed, 1, step])
    crops = []
    for _ in range(config.batch):
        scene = draw_scene(assets, ("edit_background", "edit_global", "subject_scene")[rng.integers(3)], rng, SIZE)
        pictures = (*scene.references, scene.target)
        picture = pictures[rng.integers(len(pictures))]
        top, left = rng.integers(SIZE - config.crop + 1, size=2)
        crops.append(picture[top : top + config.crop, left : left + config.crop])
    return torch.from_numpy(np.stack(crops))


def train_vae(folder: Path, config: VaeConfig = VaeConfig(), stop_after: float | None = None,
              workers: int = 0, seconds: float | None = None) -> None:  # fmt: skip
    """Train the VAE by `reconstruction_loss`, with noise and a faint L2 on the latents; one that was restored goes on.

    The noise makes the decoder forgive what the sampler leaves behind; there is no adversarial or perceptual loss.
    At the end the statistics of `bn`, which the pipeline normalises latents with, are measured on 512 pictures.
    `workers`, `seconds`: as in `train_base`, which has to come after this, for latents change. Raises ValueError where
    a run of another config is in the folder.
    """
    check_config(folder / "vae", config)
    done = folder / "vae" / f"step-{config.steps:07d}"
    if done.is_dir() and (folder / "vae" / FINISHED).is_file():
        return  # with a decoder that may have been trained further
    everything = load_assets(folder / "assets.safetensors")
    assets = everything.split("train")
    device = default_device()
    with drawn_from(config.seed):
        vae = (load_vae(folder).requires_grad_(True) if _has_vae(folder) else make_vae()).to(device)
    crops = Ahead(partial(_crops, assets, config), workers)

    def loss(step: int) -> torch.Tensor:
        pictures = to_unit(crops(step).to(device, non_blocking=True))
        noise = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(pictures).latent_dist
            latents = posterior.mean + 0.06 * torch.randn(posterior.mean.shape, generator=noise).to(device)
            decoded = vae.decode(latents).sample.float()
        return reconstruction_loss(decoded, pictures) + 1e-3 * posterior.mean.square().mean()

    def show(step: int, average: nn.Module) -> None:
        decoded_sheet(average, everything).save(folder / "vae" / f"sheet-{step:07d}.png")

    save_config(folder / "vae", config)
    optimiser = torch.optim.AdamW(vae.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=0.0)
    average = train(vae, [optimiser], loss, folder / "vae", steps=config.steps, warmup=100, ema=0.995, save_every=400,
                    show=show, show_every=400, stop_after=stop_after, seconds=seconds)  # fmt: skip
    by_the_clock = seconds is not None and (stop_after is None or stop_after >= seconds)
    if done.is_dir() or by_the_clock:  # all steps were taken, or the time is up, so the base may rely on it
        measure_latents(average, assets)
        _save_whole(average, folder / "vae" / "final")
        save_text(f"{newest_step(folder / 'vae')}\n", folder / "vae" / FINISHED)


FINISHED = "finished"
"""In the folder of a VAE's run: that `final` is what it made. A VAE that was restored lies there before any step."""


def _save_whole(part, folder: Path) -> None:
    """`part.save_pretrained(folder)`, whole or not at all."""
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    part.save_pretrained(partial)
    _put(partial, folder)


def _put(new: Path, place: Path) -> None:
    """Move a folder or file to `place`. What was there is moved aside at once, where to remove it would take a while
    in which a kill leaves half; a kill in between leaves it under `.old`."""
    old = place.with_suffix(place.suffix + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if place.is_dir():
        put_in_place(place, old)
    put_in_place(new, place)
    shutil.rmtree(old, ignore_errors=True)


def _has_vae(folder: Path) -> bool:
    """Whether the working folder holds a VAE; one that a kill left aside is put back."""
    final = folder / "vae" / "final"
    aside = final.with_suffix(".old")
    if aside.is_dir() and not final.is_dir():
        put_in_place(aside, final)
    return final.is_dir()


def reconstruction_loss(decoded: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
    """The logarithm of each picture's mean squared error, which is what PSNR counts; pixels (B, 3, H, W).

    The factor keeps it in proportion to the penalty on the latents.
    """
    return 0.05 * ((decoded - pictures).square().mean((1, 2, 3)) + 1e-5).log().mean()


@dataclass(frozen=True)
class DecoderConfig(VaeConfig):
    """The same for the decoder alone; `noise` is the standard deviation of what the latents are moved by."""

    steps: int = 2000
    lr: float = 1e-3
    seed: int = 1
    noise: float = 0.03


def train_decoder(folder: Path, config: DecoderConfig = DecoderConfig(), stop_after: float | None = None,
                  workers: int = 0) -> None:  # fmt: skip
    """Train the decoder of the VAE further, in place; run again when it is done, it does so once more.

    Latents stay what they are, so a base that knows them stays as good. Sample sheets stay in `decoder`. Raises
    ValueError where a run of another config was killed in the folder.
    """
    check_config(folder / "decoder", config)
    everything = load_assets(folder / "assets.safetensors")
    assets = everything.split("train")
    device = default_device()
    vae = load_vae(folder).to(device)
    crops = Ahead(partial(_crops, assets, config), workers)
    decoder = nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}).requires_grad_(True)

    def loss(step: int) -> torch.Tensor:
        pictures = to_unit(crops(step).to(device, non_blocking=True))
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        with torch.autocast(device.type, torch.bfloat16):
            with torch.no_grad():
                latents = vae.encode(pictures).latent_dist.mode()
            noise = torch.randn(latents.shape, generator=generator).to(device)
            return reconstruction_loss(vae.decode(latents + config.noise * noise).sample.float(), pictures)

    def show(step: int, average: nn.Module) -> None:
        averaged = load_vae(folder).to(device)
        averaged.decoder, averaged.post_quant_conv = average["decoder"], average["post_quant_conv"]
        decoded_sheet(averaged, everything).save(folder / "decoder" / f"sheet-{step:07d}.png")

    save_config(folder / "decoder", config)
    optimiser = torch.optim.AdamW(decoder.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=0.0)
    average = train(decoder, [optimiser], loss, folder / "decoder", steps=config.steps, warmup=100, ema=0.995,
                    save_every=400, show=show, show_every=400, stop_after=stop_after)  # fmt: skip
    if (folder / "decoder" / f"step-{config.steps:07d}").is_dir():
        decoder.load_state_dict(average.state_dict())
        _save_whole(vae, folder / "vae" / "final")
        for checkpoint in sorted((folder / "decoder").glob("step-*")):  # of a half of one no run would go on
            put_in_place(checkpoint, checkpoint.with_suffix(".partial"))
            shutil.rmtree(checkpoint.with_suffix(".partial"))


@torch.no_grad()
def measure_latents(vae: nn.Module, assets: Assets, pictures: int = 512) -> None:
    """Fill `vae.bn` with the mean and variance of packed latents over pictures of the training split."""
    from diffusers import Flux2KleinPipeline

    packed = []
    for seed in range(0, pictures, 32):
        scenes = [make_scene(assets, "edit_background", 7_000_000 + seed + i) for i in range(32)]
        latents = vae.encode(to_tensor([s.references[0] for s in scenes]).to(vae.device)).latent_dist.mode()
        packed.append(Flux2KleinPipeline._patchify_latents(latents))
    values = torch.cat(packed).transpose(0, 1).flatten(1)
    vae.bn.running_mean.copy_(values.mean(1))
    vae.bn.running_var.copy_(values.var(1))


SIDES = (96, SIZE, REFERENCE, REFERENCE)  # of a subject's references, in pixels; one is drawn
IN_TURN = 4  # batches, of which one comes again when the others were taken
ALONE = (*EDITS, "subject_place", "subject_scale")  # the tasks with one reference


@dataclass(frozen=True)
class BaseConfig:
    """The dense base: `steps` batches of samples whose references have the same number and sizes.

    `mix` holds the share of each task; until `alone_until` of the run only the tasks with one reference are drawn, and
    until `small_until` the references of subjects have 128 pixels, afterwards one of `SIDES`: small ones leave room for
    more samples, from which it is learned sooner which reference is meant; large ones are what the model is for.
    Objects move by one token at most until the first of `reach`, then farther by the same factor each step, and as far
    as they like from the second: copying is learned in place first. A batch has `batch` samples where there is one
    reference of 128 pixels, more or fewer with other tokens, so that steps cost the same, but no fewer than four. Each
    batch is taken `repeats` times, with other noise, in turns of `IN_TURN`: to compose and to encode one may take as
    long as the step. An output token inside an object counts `1 + focus` times; `teach` is the weight of the
    `correspondence_loss`.
    """

    steps: int = 3800
    batch: int = 16
    repeats: int = 1
    lr: float = 1e-3
    muon_lr: float = 2e-3
    warmup: int = 100
    ema: float = 0.999
    alone_until: float = 0.3
    small_until: float = 0.15
    reach: tuple[float, float] = (0.0, 0.2)
    focus: float = 2.0
    teach: float = 0.1
    vocabulary: int = 512
    seed: int = 0
    mix: tuple[tuple[str, float], ...] = (
        ("edit_background", 0.08),
        ("edit_object", 0.08),
        ("edit_global", 0.07),
        ("edit_remove", 0.01),
        ("subject_place", 0.29),
        ("subject_scale", 0.01),
        ("subject_pair", 0.18),
        ("subject_scene", 0.12),
        ("subject_quarters", 0.16),
    )

    def __post_init__(self) -> None:
        if not self.repeats >= 1:
            raise ValueError(f"repeats is {self.repeats!r}: pass a whole number, 1 or more.")

    @property
    def without_easy_part(self) -> "BaseConfig":
        """For a model that has learned to copy already, with optimisers that begin anew."""
        return replace(self, alone_until=0.0, small_until=0.0, reach=(-1.0, 0.0), warmup=max(self.warmup, 200))


def batch_scenes(assets: Assets, config: BaseConfig, step: int) -> list[Scene]:
    """The scenes of one step: references of the same number and sizes, and where that is one, of different tasks."""
    rng = np.random.default_rng([config.seed, 2, step])
    names, shares = map(list, zip(*config.mix, strict=True))
    weights = np.array(shares)
    if step < config.alone_until * config.steps:
        weights[[name not in ALONE for name in names]] = 0
    begin, end = (share * config.steps for share in config.reach)
    reach = round(FAR ** np.interp(step, (begin, end), (0, 1)))
    side = int(rng.choice(SIDES)) if step >= config.small_until * config.steps else SIZE

    def draw() -> Scene:
        return draw_scene(assets, names[rng.choice(len(names), p=weights / weights.sum())], rng, side, reach)

    scenes = [draw()]
    shapes = [picture.shape for picture in scenes[0].references]
    alike = [name for name in ALONE if (name in EDITS) == scenes[0].task.startswith("edit_")]
    if len(shapes) > 1:
        alike = [scenes[0].task]
    elif side == SIZE:
        alike = [*ALONE]
    weights[[name not in alike for name in names]] = 0  # others would have other shapes
    tokens = [TEXT_LENGTH + sum(rows * columns for rows, columns, _ in pictures) // TOKEN**2
              for pictures in ([scenes[0].target.shape] * 2, [scenes[0].target.shape, *shapes])]  # fmt: skip
    while len(scenes) < max(min(4, config.batch), round(config.batch * tokens[0] / tokens[1])):
        scene = draw()
        if [picture.shape for picture in scene.references] == shapes:
            scenes.append(scene)
    return scenes


class Batch(NamedTuple):
    """The scenes of a step as tensors. pictures: uint8 (B, S, S, 3), the targets and then each reference; ids, attends:
    of the prompts, int64 (B, 32); source: int64 (B, 256); focus: float32 (B, 256)."""

    pictures: list[torch.Tensor]
    ids: torch.Tensor
    attends: torch.Tensor
    source: torch.Tensor
    focus: torch.Tensor


def make_batch(assets: Assets, config: BaseConfig, tokenizer: Qwen2Tokenizer, step: int) -> Batch:
    """The `batch_scenes` of one step, ready for a device."""
    scenes = batch_scenes(assets, config, step)
    pictures = zip(*((scene.target, *scene.references) for scene in scenes), strict=True)
    return Batch(
        [torch.from_numpy(np.stack(same)) for same in pictures],
        *tokenise(tokenizer, [scene.prompt for scene in scenes]),
        torch.from_numpy(np.stack([scene.source for scene in scenes])).flatten(1),
        torch.from_numpy(np.stack([scene.focus for scene in scenes])).flatten(1),
    )


def batch_number(step: int, repeats: int) -> int:
    """Which batch a step takes: of `IN_TURN` that follow each other, one after the other, `repeats` times."""
    if repeats == 1:
        return step
    return step // (IN_TURN * repeats) * IN_TURN + step % IN_TURN


def position_ids(rows: int, columns: int, t: int) -> torch.Tensor:
    """(rows * columns, 4) int64: the pipeline's (T, H, W, L) coordinates of one picture."""
    return torch.cartesian_prod(torch.tensor([t]), torch.arange(rows), torch.arange(columns), torch.tensor([0]))


def tokenise(tokenizer: Qwen2Tokenizer, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts -> token ids and which of them count, int64 (B, 32) each, as `Flux2KleinPipeline` makes them."""
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True)
        for p in prompts
    ]
    inputs = tokenizer(texts, return_tensors="pt", padding="max_length", truncation=True, max_length=TEXT_LENGTH)
    return inputs["input_ids"], inputs["attention_mask"]


def encode_text(text_encoder: nn.Module, ids: torch.Tensor, attends: torch.Tensor) -> torch.Tensor:
    """What `tokenise` made -> (B, 32, 128), as `Flux2KleinPipeline` makes it, but with gradients."""
    inputs = {"input_ids": ids, "attention_mask": attends}
    hidden = text_encoder.model(**inputs, output_hidden_states=True, use_cache=False).hidden_states
    return torch.cat([hidden[layer] for layer in TEXT_LAYERS], dim=-1)


def prompt_corpus(assets: Assets) -> list[str]:
    """Prompts of every task, for the tokenizer."""
    return [make_scene(assets, task, seed).prompt for task in TASKS for seed in range(400)]


TOWARDS_NOISE = 5.0
"""The shift of the noise levels in training, uniform ones. A call has more of them near the picture, but what moves is
found, or not, in its first steps: in one probe the error on an object to be placed was three times as large from pure
noise as from 0.77, where the noisy picture gives its place away; that on an object that stays was no larger."""


def compiled_blocks(transformer) -> Callable[[], contextlib.AbstractContextManager]:
    """A context within which the transformer's blocks run compiled, for all shapes; they are compiled at first use.

    Outside of it they are what they were, so that a copy of the transformer runs its own weights.
    """
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    made = [torch.compile(block.forward, dynamic=True) for block in blocks]

    @contextlib.contextmanager
    def within() -> Iterator[None]:
        for block, forward in zip(blocks, made, strict=True):
            block.forward = forward
        try:
            yield
        finally:
            for block in blocks:
                del block.forward

    return within


COPYING = ((4, 3), (5, 2), (6, 3))
"""The heads (single block, head) that are taught where to look. Those that did best by themselves in an earlier run."""


@contextlib.contextmanager
def watched_heads(transformer, heads: Sequence[tuple[int, int]]) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Within, a forward pass leaves the normed queries and keys of `heads` in the list: (B, tokens, d) each.

    They come in the order of the blocks, and are made anew from what a block is given: what a block does inside may be
    compiled, and not to be looked into.
    """
    from diffusers.models.transformers.transformer_flux2 import Flux2Modulation

    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []

    def look(block, _, given: dict[str, torch.Tensor], head: int) -> None:
        attention = block.attn
        shift, scale, _ = Flux2Modulation.split(given["temb_mod"], 1)[0]
        hidden = (1 + scale) * block.norm(given["hidden_states"]) + shift
        of_query, of_key, *_ = attention.to_qkv_mlp_proj.weight.split(attention.inner_dim)
        rows = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
        query, key = (nn.functional.linear(hidden, weight[rows]) for weight in (of_query, of_key))
        pairs.append((attention.norm_q(query), attention.norm_k(key)))

    with contextlib.ExitStack() as hooks:
        for number, head in heads:
            block = transformer.single_transformer_blocks[number]
            handle = block.register_forward_pre_hook(partial(look, head=head), with_kwargs=True)
            hooks.callback(handle.remove)
        yield pairs


def correspondence_loss(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], rotary: tuple[torch.Tensor, torch.Tensor],
                        source: torch.Tensor, text_tokens: int) -> torch.Tensor:  # fmt: skip
    """Cross-entropy of where heads look, against the reference token that each output token shows (`Scene.source`).

    pairs: what `watched_heads` saw; rotary: the cosines and sines of all tokens; source: int64 (B, output tokens), on
    the CPU so that no device is waited for. -1 is a token that shows nothing of a reference: it should look at anything
    but references, so that clutter beside an object stays behind. Samples of -1 alone teach nothing; else the two kinds
    of tokens weigh the same. Found from the pictures alone, an object that moves costs several times as many samples:
    nothing pulls a head to the right token until it already looks there.
    """
    from diffusers.models.embeddings import apply_rotary_emb

    own = text_tokens + source.shape[1]
    known = (source >= 0).any(1, keepdim=True)
    which, where = (source >= 0).nonzero(as_tuple=True)
    truth = source[which, where] + own
    bare = (known & (source < 0)).nonzero(as_tuple=True)
    losses = []
    for query, key in pairs:
        query, key = (apply_rotary_emb(t[:, :, None], rotary, sequence_dim=1)[:, :, 0] for t in (query, key))
        scores = torch.bmm(query[:, text_tokens:own], key.transpose(1, 2)) * query.shape[-1] ** -0.5
        looks = scores.float().log_softmax(-1)
        losses.append(-looks[which, where, truth].mean())
        if len(bare[0]):
            losses[-1] = losses[-1] - looks[bare][:, :own].logsumexp(-1).mean()
    return torch.stack(losses).mean()


def flow_matching_loss(transformer, text: torch.Tensor, target: torch.Tensor, references: Sequence[torch.Tensor],
                       generator: torch.Generator, weights: torch.Tensor | None = None,
                       source: torch.Tensor | None = None, teach: float = 0.0) -> torch.Tensor:  # fmt: skip
    """Mean squared error of the velocity on the output tokens, and `teach` times the `correspondence_loss`.

    target: latents (B, C, H, W); references: latents (B, C, h, w) each; weights: of each output token, (B, H * W), or
    None for equal ones; source: as in `correspondence_loss`. `generator` draws on the CPU, so that a seed means the
    same noise on every device.
    """
    device = target.device
    rows, columns = target.shape[-2:]
    clean = target.flatten(2).transpose(1, 2)
    context = [reference.flatten(2).transpose(1, 2) for reference in references]
    u = torch.rand(len(target), generator=generator).clamp(1e-4, 1 - 1e-4)
    sigma = noise_levels(u, "none", TOWARDS_NOISE).to(device)
    noise = torch.randn(clean.shape, generator=generator).to(device)
    noisy = torch.lerp(clean, noise, sigma.view(-1, 1, 1))
    ids = [position_ids(rows, columns, 0)]
    ids += [
        position_ids(reference.shape[-2], reference.shape[-1], 10 * (i + 1)) for i, reference in enumerate(references)
    ]
    img_ids = torch.cat(ids).to(device)
    txt_ids = torch.zeros(text.shape[1], 4, dtype=torch.int64, device=device)
    txt_ids[:, 3] = torch.arange(text.shape[1])
    teaching = source is not None and teach > 0 and bool((source >= 0).any())
    with watched_heads(transformer, COPYING if teaching else ()) as pairs:
        velocity = transformer(
            hidden_states=torch.cat([noisy, *context], dim=1),
            encoder_hidden_states=text,
            timestep=sigma,
            img_ids=img_ids,
            txt_ids=txt_ids,
            return_dict=False,
        )[0][:, : clean.shape[1]]
    error = (velocity.float() - (noise - clean)).square().mean(-1)
    loss = error.mean() if weights is None else (error * weights).sum() / weights.sum()
    if teaching:
        rotary = transformer.pos_embed(torch.cat([txt_ids, img_ids]))
        loss = loss + teach * correspondence_loss(pairs, rotary, source, text.shape[1])
    return loss


def train_base(folder: Path, config: BaseConfig = BaseConfig(), stop_after: float | None = None,
               workers: int = 0, seconds: float | None = None, save_every: int = 100, show_every: int = 500,
               compiled: bool = False) -> None:  # fmt: skip
    """Train transformer and text encoder together on all reference tokens; the VAE has to be there already.

    `workers` processes compose the scenes ahead of the steps; with 0 a thread does. `seconds` trains by the clock
    (`loop.train`). `compiled`: by `compiled_blocks`, for a GPU; it takes a minute or more first. What was restored goes
    on without the easy part, and with other scenes than before. Raises ValueError where a run of another config is in
    the folder.
    """
    before = _steps_before(folder)
    if before:
        config = replace(config.without_easy_part, seed=config.seed + before)
    check_config(folder / "base", config)
    everything = load_assets(folder / "assets.safetensors")
    assets = everything.split("train")
    device = default_device()
    vae = load_vae(folder).to(device)
    if not (folder / "tokenizer").is_dir():  # its ids belong to the embeddings that are being trained
        _save_whole(make_tokenizer(prompt_corpus(assets), config.vocabulary), folder / "tokenizer")
    tokenizer = Qwen2Tokenizer.from_pretrained(folder / "tokenizer")
    with drawn_from(config.seed):
        modules = nn.ModuleDict({"transformer": make_transformer(), "text_encoder": make_text_encoder(tokenizer)})
    modules.to(device)
    of_batches = replace(config, steps=max(1, config.steps // config.repeats))  # whose steps its shares are of
    batches = Ahead(partial(make_batch, assets, of_batches, tokenizer), workers)
    fast = compiled_blocks(modules["transformer"]) if compiled else contextlib.nullcontext

    @lru_cache(maxsize=IN_TURN if config.repeats > 1 else 1)
    def encoded(number: int) -> tuple[Batch, list[torch.Tensor]]:
        """A batch, what of it the steps need on the device, and the latents of its pictures."""
        batch = batches(number)
        with torch.autocast(device.type, torch.bfloat16):
            latents = [encode_pictures(vae, to_unit(pictures.to(device, non_blocking=True))).float()
                       for pictures in batch.pictures]  # fmt: skip
        there = {name: getattr(batch, name).to(device, non_blocking=True) for name in ("ids", "attends", "focus")}
        return batch._replace(pictures=[], **there), latents

    def loss(step: int) -> torch.Tensor:
        batch, (target, *references) = encoded(batch_number(step, config.repeats))
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        with torch.autocast(device.type, torch.bfloat16):
            text = encode_text(modules["text_encoder"], batch.ids, batch.attends)
            with MatmulAttention() if device.type == "cpu" else contextlib.nullcontext(), fast():
                return flow_matching_loss(modules["transformer"], text, target, references, generator,
                                          1 + config.focus * batch.focus, batch.source, config.teach)  # fmt: skip

    blocks = ("transformer.transformer_blocks", "transformer.single_transformer_blocks")
    optimisers = make_optimisers(modules, blocks, config.lr, config.muon_lr)

    def show(step: int, average: nn.Module) -> None:
        sheet = sample_sheet(make_pipeline(vae, average["transformer"], average["text_encoder"], tokenizer), everything)
        sheet.save(folder / "base" / f"sheet-{step:07d}.png")

    save_config(folder / "base", config)
    save_text(fingerprint(vae.encoder) + "\n", folder / "base" / LATENTS)
    train(modules, optimisers, loss, folder / "base", steps=config.steps, warmup=config.warmup, save_every=save_every,
          ema=config.ema, show=show, show_every=show_every, stop_after=stop_after, seconds=seconds)  # fmt: skip


LATENTS = "latents.txt"
"""In the folder of a base: the fingerprint of the encoder whose latents it knows."""


def save_config(run: Path, config: Any) -> None:
    """Write what `check_config` reads."""
    run.mkdir(parents=True, exist_ok=True)
    save_text(json.dumps(asdict(config), indent=2), run / "config.json")


def check_config(run: Path, config: Any) -> None:
    """Raise ValueError where the folder `run` holds a run that was begun with another config of this dataclass, or one
    whose config cannot be read."""
    if not newest_step(run):
        return
    begun = read_record(run)
    if "steps" not in begun:
        raise ValueError(f"{run / 'config.json'} is no record of a run: put the run's own back, or move it away.")
    record, own = (json.loads(json.dumps(asdict(each))) for each in (config, type(config)()))
    for name, value in record.items():
        before = begun.get(name, own[name])  # of a run begun before a setting was there
        if before != value:
            raise ValueError(
                f"The run in {run} was begun with {name} {before!r}, not {value!r}: continue it with its own, or move "
                "it away."
            )


BEFORE = "before.json"
"""In the folder of a base that was restored: the call settings of the weights that it goes on from."""


def _steps_before(folder: Path) -> int:
    """The steps that the base's weights had seen when they were restored; 0 for a base from nothing."""
    before = folder / "base" / BEFORE
    return json.loads(before.read_text(encoding="utf-8"))["training_steps"] if before.is_file() else 0


def restore(weights: Path, folder: Path) -> None:
    """Put an exported pipeline into the working folder, where `train_base` goes on from it at step 0.

    Raises FileExistsError where the folder holds a run of the base or of the VAE already.
    """
    for name, there in (("base", (folder / "base").exists()), ("vae", newest_step(folder / "vae") > 0)):
        if there:
            raise FileExistsError(f"{folder / name} is there already: move it away to start from {weights}")
    pipe = load_pipeline(str(weights), dtype="float32", device="cpu")
    pipe.vae.save_pretrained(folder / "vae" / "final")
    shutil.copytree(weights / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
    partial = folder / "base.partial"  # renamed when it is whole: half of it would start from nothing
    shutil.rmtree(partial, ignore_errors=True)
    start_from(nn.ModuleDict({"transformer": pipe.transformer, "text_encoder": pipe.text_encoder}), partial)
    shutil.copy(weights / "call.json", partial / BEFORE)
    save_text(fingerprint(pipe.vae.encoder) + "\n", partial / LATENTS)
    put_in_place(partial, folder / "base")


def load_vae(folder: Path):
    """The trained VAE of the working folder, frozen."""
    from diffusers import AutoencoderKLFlux2

    if not _has_vae(folder):
        raise FileNotFoundError(f"{folder / 'vae' / 'final'} is missing: run `python -m sparse_context.mini vae` first")
    # A copy: a trained decoder takes the place of this file, which Windows does not move as long as it is mapped
    return copy.deepcopy(AutoencoderKLFlux2.from_pretrained(folder / "vae" / "final")).eval().requires_grad_(False)


def sample_sheet(pipe, assets: Assets, per_task: int = 2) -> Image.Image:
    """Validation scenes of every task: for each scene its first reference, the truth and the dense output."""
    held_out = assets.split("validation")
    pipe.set_progress_bar_config(disable=True)
    lines = []
    for number, task in enumerate(TASKS):
        tiles = []
        for seed in range(per_task):
            scene = make_scene(held_out, task, 100 + 10 * number + seed)
            reference = cv2.resize(scene.references[0], (SIZE, SIZE), interpolation=cv2.INTER_AREA)
            tiles += [reference, scene.target, generate(pipe, scene)]
        lines.append(np.hstack(tiles))
    return Image.fromarray(np.vstack(lines))


@torch.no_grad()
def decoded_sheet(vae: nn.Module, assets: Assets, rows: int = 4, columns: int = 4) -> Image.Image:
    """Pictures of the validation split, each beside what the VAE decodes from its latents."""
    held_out = assets.split("validation")
    pictures = np.stack([make_scene(held_out, "edit_background", 100 + i).references[0] for i in range(rows * columns)])
    latents = vae.encode(to_unit(torch.from_numpy(pictures)).to(vae.device)).latent_dist.mode()
    decoded = ((vae.decode(latents).sample + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu()
    pairs = np.concatenate([pictures, decoded.numpy()], axis=2).reshape(rows, columns, SIZE, 2 * SIZE, 3)
    return Image.fromarray(pairs.swapaxes(1, 2).reshape(rows * SIZE, columns * 2 * SIZE, 3))


def generate(pipe, scene: Scene, seed: int = 0, steps: int = 8) -> np.ndarray:
    """The pipeline's answer to a scene, uint8 (128, 128, 3)."""
    with torch.autocast(pipe.device.type, torch.bfloat16):
        return np.asarray(
            pipe(
                image=[Image.fromarray(r) for r in scene.references],
                prompt=scene.prompt,
                num_inference_steps=steps,
                max_sequence_length=TEXT_LENGTH,
                text_encoder_out_layers=TEXT_LAYERS,
                generator=torch.Generator().manual_seed(seed),
                height=SIZE,
                width=SIZE,
            ).images[0]
        )


def export(folder: Path, destination: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write the averaged weights as a pipeline in the diffusers layout, with the call settings beside it.

    dtype: bf16 as the package holds it; in float32 `restore` goes on from what was trained, without rounding. All is
    written beside it first, so a kill leaves what was there, or an `.old` part of it for the moment of a rename.
    Adapters that lie there and were trained on other weights are removed. Raises ValueError where the VAE was trained
    after the base, which does not know its latents then.
    """
    vae, knows = load_vae(folder), folder / "base" / LATENTS
    if knows.is_file() and knows.read_text(encoding="utf-8").strip() != fingerprint(vae.encoder):
        raise ValueError(f"The VAE in {folder / 'vae'} was trained after the base, which has to follow: run `base`.")
    tokenizer = Qwen2Tokenizer.from_pretrained(folder / "tokenizer")
    with drawn_from(0):  # and then loaded
        modules = nn.ModuleDict({"transformer": make_transformer(), "text_encoder": make_text_encoder(tokenizer)})
    step = load_average(folder / "base", modules) + _steps_before(folder)
    pipe = make_pipeline(vae, modules["transformer"], modules["text_encoder"], tokenizer)
    pipe.vae.register_to_config(_name_or_path="")  # else its config names the working folder of this machine
    pipe.to(dtype=dtype)
    now = fingerprint(pipe.transformer.float())  # adapters were trained on these values as they are in bf16
    pipe.to(dtype=dtype)
    partial = destination.with_name(destination.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipe.save_pretrained(partial, safe_serialization=True)
    # Loaded without a dtype, diffusers makes its parts float32, and transformers what this says: they have to agree
    config = partial / "text_encoder" / "config.json"
    encoder = json.loads(config.read_text(encoding="utf-8"))
    save_text(json.dumps(encoder | {"dtype": "float32"}, indent=2) + "\n", config)
    settings = {
        "height": SIZE,
        "width": SIZE,
        "reference_size": {"edit": SIZE, "subject": REFERENCE},
        "max_references": 4,
        "num_inference_steps": 8,
        "max_sequence_length": TEXT_LENGTH,
        "text_encoder_out_layers": list(TEXT_LAYERS),
        "training_steps": step,
    }
    save_text(json.dumps(settings, indent=2) + "\n", partial / "call.json")
    destination.mkdir(parents=True, exist_ok=True)
    for adapter in (destination / own.name for own in ADAPTERS.values()):
        if adapter.is_file() and adapter_record(adapter).get("base_weights") != now:
            adapter.unlink()
    for part in sorted(partial.iterdir()):
        _put(part, destination / part.name)
    partial.rmdir()


def export_examples(folder: Path, destination: Path, scenes: dict[str, tuple[str, int]]) -> None:
    """Write scenes of the test split for the demo: pictures as lossless webp, and `scenes.json` that lists them.

    `scenes` maps a name to (task, seed).
    """
    assets = load_assets(folder / "assets.safetensors").split("test")
    destination.mkdir(parents=True, exist_ok=True)
    listing = []
    for name, (task, seed) in scenes.items():
        scene = make_scene(assets.without_objects() if name in PHOTOGRAPHS else assets, task, seed)
        files = [f"{name}-{i + 1}.webp" for i in range(len(scene.references))]
        for file, picture in zip([*files, f"{name}-truth.webp"], [*scene.references, scene.target], strict=True):
            Image.fromarray(picture).save(destination / file, lossless=True, method=6)
        listing.append({"name": name, "task": scene.task, "tasks": tasks_of(scene), "prompt": scene.prompt,
                        "references": files, "truth": f"{name}-truth.webp"})  # fmt: skip
    save_text(json.dumps(listing, indent=2) + "\n", destination / "scenes.json")


EXAMPLES = {
    "background": ("edit_background", 6),
    "background-2": ("edit_background", 7),
    "negative": ("edit_global", 5),
    "grey": ("edit_global", 11),
    "sepia": ("edit_global", 32),
    "recoloured": ("edit_object", 12),
    "placed": ("subject_place", 9),
    "side-by-side": ("subject_pair", 3),
    "in-front": ("subject_scene", 6),
    "quarters": ("subject_quarters", 15),
}
"""The demo's scenes: name -> (task, seed). Chosen by their references and truths, before any output was seen."""

PHOTOGRAPHS = ("sepia",)
"""Those of a whole photograph, with nothing pasted into it."""
