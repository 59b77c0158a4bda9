"""The VAE, and its decoder alone."""

import copy
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from sparse_context.images import put_in_place, save_text
from sparse_context.training.checkpoints import newest_step
from sparse_context.training.data import Ahead
from sparse_context.training.loop import LoopConfig, train
from sparse_context.training.optimisers import drawn_from

from .data import Assets, load_assets
from .model import make_vae
from .run_folder import autocast, check_config, default_device, save_config, save_whole, to_tensor, to_unit
from .scenes import SIZE, draw_scene, make_scene


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


def train_vae(
    folder: Path,
    config: VaeConfig = VaeConfig(),
    stop_after: float | None = None,
    workers: int = 0,
    seconds: float | None = None,
) -> None:
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
        with autocast(device):
            posterior = vae.encode(pictures).latent_dist
            latents = posterior.mean + 0.06 * torch.randn(posterior.mean.shape, generator=noise).to(device)
            decoded = vae.decode(latents).sample.float()
        return reconstruction_loss(decoded, pictures) + 1e-3 * posterior.mean.square().mean()

    def show(step: int, average: nn.Module) -> None:
        decoded_sheet(average, everything).save(folder / "vae" / f"sheet-{step:07d}.png")

    save_config(folder / "vae", config)
    optimiser = torch.optim.AdamW(vae.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=0.0)
    average = train(
        vae,
        [optimiser],
        loss,
        folder / "vae",
        LoopConfig(
            steps=config.steps,
            warmup=100,
            ema=0.995,
            save_every=400,
            show_every=400,
            stop_after=stop_after,
            seconds=seconds,
        ),
        show=show,
    )
    by_the_clock = seconds is not None and (stop_after is None or stop_after >= seconds)
    if done.is_dir() or by_the_clock:  # all steps were taken, or the time is up, so the base may rely on it
        measure_latents(average, assets)
        save_whole(average, folder / "vae" / "final")
        save_text(f"{newest_step(folder / 'vae')}\n", folder / "vae" / FINISHED)


FINISHED = "finished"
"""In the folder of a VAE's run: that `final` is what it made. A VAE that was restored lies there before any step."""


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


def train_decoder(
    folder: Path, config: DecoderConfig = DecoderConfig(), stop_after: float | None = None, workers: int = 0
) -> None:
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
        with autocast(device):
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
    average = train(
        decoder,
        [optimiser],
        loss,
        folder / "decoder",
        LoopConfig(steps=config.steps, warmup=100, ema=0.995, save_every=400, show_every=400, stop_after=stop_after),
        show=show,
    )
    if (folder / "decoder" / f"step-{config.steps:07d}").is_dir():
        decoder.load_state_dict(average.state_dict())
        save_whole(vae, folder / "vae" / "final")
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


def load_vae(folder: Path):
    """The trained VAE of the working folder, frozen."""
    from diffusers import AutoencoderKLFlux2

    if not _has_vae(folder):
        raise FileNotFoundError(f"{folder / 'vae' / 'final'} is missing: run `python -m recipes.mini vae` first")
    # A copy: a trained decoder takes the place of this file, which Windows does not move as long as it is mapped
    return copy.deepcopy(AutoencoderKLFlux2.from_pretrained(folder / "vae" / "final")).eval().requires_grad_(False)


@torch.no_grad()
def decoded_sheet(vae: nn.Module, assets: Assets, rows: int = 4, columns: int = 4) -> Image.Image:
    """Pictures of the validation split, each beside what the VAE decodes from its latents."""
    held_out = assets.split("validation")
    pictures = np.stack([make_scene(held_out, "edit_background", 100 + i).references[0] for i in range(rows * columns)])
    latents = vae.encode(to_unit(torch.from_numpy(pictures)).to(vae.device)).latent_dist.mode()
    decoded = ((vae.decode(latents).sample + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu()
    pairs = np.concatenate([pictures, decoded.numpy()], axis=2).reshape(rows, columns, SIZE, 2 * SIZE, 3)
    return Image.fromarray(pairs.swapaxes(1, 2).reshape(rows * SIZE, columns * 2 * SIZE, 3))
