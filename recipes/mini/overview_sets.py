"""What a training step of overviews sees: the tokens that it keeps, of the kinds of overview.py, and the picture that
these hold."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.functional import interpolate

from sparse_context.families.host import flat
from sparse_context.overview import overview_ids, residual, shrink
from sparse_context.selectors import SELECTORS
from sparse_context.training.dropping import blobs

from .base import BaseConfig, batch_scenes
from .data import Assets
from .loss import position_ids, tokenise
from .model import decode_pictures, encode_pictures
from .scenes import TOKEN, Scene


@dataclass(frozen=True)
class OverviewConfig:
    """How a run of overviews trains.

    steps: weight updates. batch: scenes of one reference of 128 pixels in each (fewer samples where there are more
        tokens). subsets: how often a batch of scenes is taken, each time with other tokens and noise.
    lr, muon_lr: peak learning rates of the new blocks, of Adam's parameters and of Muon's. old: the share of these that
        the old blocks behind them take. warmup: steps. ema: decay of the weights' average.
    factors: of overviews, one drawn a set. mix: shares of the kinds of sets. scenes: shares of the tasks of scenes.
    keep: least and greatest share of sharp tokens, drawn evenly by its logarithm.
    reading: the first steps, in which the new blocks learn to read overviews and nothing else is done.
    taught: heads that one step tells where to look. teach: weight of the loss of where they look. read: that of what
        new blocks add. follow: that of the blocks' distance to the teacher.
    focus, sharp: an output token counts 1 + `focus` * what the scene's focus is there, and `sharp` more where its
        source is a sharp token beside an overview.
    seed: of all that is drawn.
    """

    steps: int = 24_000
    batch: int = 8
    subsets: int = 3
    lr: float = 1e-3
    muon_lr: float = 2e-3
    old: float = 0.75
    warmup: int = 100
    ema: float = 0.998
    factors: tuple[int, ...] = (2, 4)
    mix: tuple[tuple[str, float], ...] = (("plain", 0.15), ("alone", 0.2), ("sharp", 0.65))
    scenes: tuple[tuple[str, float], ...] = (
        ("edit_background", 0.15),
        ("edit_object", 0.1),
        ("edit_global", 0.2),
        ("subject_place", 0.25),
        ("subject_pair", 0.12),
        ("subject_scene", 0.08),
        ("subject_quarters", 0.1),
    )
    keep: tuple[float, float] = (0.03, 0.5)
    reading: int = 600
    taught: int = 5
    teach: float = 0.2
    read: float = 0.5
    follow: float = 0.5
    focus: float = 2.0
    sharp: float = 2.0
    seed: int = 0


class TokenSet(NamedTuple):
    """What a set holds. kind: of `OverviewConfig.mix`. factor: of the overview, 0 without one. kept: int64, the sharp
    tokens, counted through all references."""

    kind: str
    factor: int
    kept: np.ndarray


def draw_set(
    config: OverviewConfig, scenes: Sequence[Scene], seed: Sequence[int], overviews_alone: bool = False
) -> TokenSet:
    """The tokens that one step keeps. Where a scene's source is not known (`has_source`), they are plain."""
    rng = np.random.default_rng(list(seed))
    names, shares = map(list, zip(*config.mix, strict=True))
    weights = np.array(shares)
    if not all(has_source(scene) for scene in scenes):
        weights[[name in ("alone", "sharp") for name in names]] = 0
    elif overviews_alone:
        weights[[name == "plain" for name in names]] = 0
    kind = str(rng.choice(names, p=weights / weights.sum()))
    factor = int(rng.choice(config.factors))
    keep = float(np.exp(rng.uniform(*np.log(config.keep))))
    shown = scenes[rng.integers(len(scenes))]
    parts, start = [], 0
    for picture, mask in zip(shown.references, shown.reference_masks, strict=True):
        grid = picture.shape[0] // TOKEN, picture.shape[1] // TOKEN
        tokens = grid[0] * grid[1]
        count = 0 if kind == "alone" else max(1, round(keep * tokens))
        scores = scores_of(picture, mask, grid, factor, rng, kind == "sharp")
        parts.append(start + np.sort(np.argsort(-scores.ravel(), kind="stable")[:count]))
        start += tokens
    return TokenSet(kind, factor if kind in ("alone", "sharp") else 0, np.concatenate(parts).astype(np.int64))


def scores_of(
    picture: np.ndarray, mask: np.ndarray, grid: tuple[int, int], factor: int, rng: np.random.Generator, sharp: bool
) -> np.ndarray:
    """The scores by which a set is chosen, (rows, columns); beside an overview mostly where that is wrong."""
    draw = rng.random()
    covered = mask.reshape(grid[0], TOKEN, grid[1], TOKEN).mean((1, 3)) if mask.shape == picture.shape[:2] else 1.0
    if sharp and draw < 0.35:
        return residual(picture, grid, factor)
    if sharp and draw < 0.7:
        return residual(picture, grid, factor) * (0.1 + covered)
    kinds: list[Any] = [SELECTORS["random"], SELECTORS["uniform"], SELECTORS["edges"], blobs, lambda *_: covered]
    scores = kinds[rng.integers(len(kinds))](picture, grid, rng)
    return np.broadcast_to(scores, grid) + 1e-6 * rng.random(grid)


def aligned(scene: Scene) -> bool:
    """Whether the reference lies where the output does."""
    return scene.task.startswith("edit_") and scene.task != "edit_remove"


def has_source(scene: Scene) -> bool:
    """Whether the scene knows which reference token each output token shows: what a head that reads overviews is taught
    by."""
    return bool((scene.source >= 0).any())


class Batch(NamedTuple):
    """Scenes as tensors: pictures uint8 (B, S, S, 3), targets and then references; the rest as in base.Batch."""

    scenes: list[Scene]
    pictures: list[torch.Tensor]
    ids: torch.Tensor
    attends: torch.Tensor
    source: torch.Tensor
    focus: torch.Tensor


def make_batch(assets: Assets, config: OverviewConfig, tokenizer: Any, number: int) -> Batch:
    """Batch `number` of a run, from its config and number alone: its scenes, and their prompts as tokens."""
    scenes_config = replace(
        BaseConfig().without_easy_part, batch=config.batch, seed=config.seed + 5_000, mix=config.scenes
    )
    scenes = batch_scenes(assets, scenes_config, number)
    pictures = zip(*((scene.target, *scene.references) for scene in scenes), strict=True)
    return Batch(
        scenes,
        [torch.from_numpy(np.stack(same)) for same in pictures],
        *tokenise(tokenizer, [scene.prompt for scene in scenes]),
        torch.from_numpy(np.stack([scene.source for scene in scenes])).flatten(1),
        torch.from_numpy(np.stack([scene.focus for scene in scenes])).flatten(1),
    )


# The tokens of a set --------------------------------------------------------------------------------------------------


def reference_tokens(
    vae: nn.Module, pictures: Sequence[torch.Tensor], latents: Sequence[torch.Tensor], tokens: TokenSet
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference tokens of a set, (B, N, C), and their ids, float32 (N, 4): sharp ones, then the overviews.

    pictures: (B, 3, H, W) in [-1, 1]. latents: (B, C, rows, columns) of each.
    """
    ids = [position_ids(*part.shape[-2:], 10 * (i + 1)).float() for i, part in enumerate(latents)]
    kept = torch.from_numpy(tokens.kept)
    sharp = torch.cat([flat(part) for part in latents], 1).index_select(1, kept.to(latents[0].device))
    parts, all_ids = [sharp], [torch.cat(ids).index_select(0, kept)]
    if tokens.factor:
        for picture, part, whole_ids in zip(pictures, latents, ids, strict=True):
            grid = (part.shape[-2], part.shape[-1])
            parts.append(flat(encode_pictures(vae, shrink(picture, grid, tokens.factor)).float()))
            all_ids.append(overview_ids(whole_ids, grid, tokens.factor, (0, 1.0)))
    return torch.cat(parts, 1), torch.cat(all_ids)


def grids_of(latents: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
    """Rows and columns of each reference."""
    return [(part.shape[-2], part.shape[-1]) for part in latents]


@torch.no_grad()
def composites(
    vae: nn.Module, pictures: Sequence[torch.Tensor], grids: Sequence[tuple[int, int]], tokens: TokenSet
) -> list[torch.Tensor]:
    """What a set with overviews holds of each reference, as pictures."""
    held, start = [], 0
    for picture, (rows, columns) in zip(pictures, grids, strict=True):
        kept = tokens.kept[(tokens.kept >= start) & (tokens.kept < start + rows * columns)] - start
        held.append(composite(vae, picture, (rows, columns), tokens.factor, kept))
        start += rows * columns
    return held


@torch.no_grad()
def composite(
    vae: nn.Module, picture: torch.Tensor, grid: tuple[int, int], factor: int, kept: np.ndarray
) -> torch.Tensor:
    """The picture that a set holds of one reference: the enlarged overview, and the picture itself in sharp cells.

    The overview is taken as the VAE gives it back, which is what its tokens hold. The small picture itself holds 5 dB
    more, which no reader could find in them.
    """
    shown = np.zeros(grid[0] * grid[1], np.float32)
    shown[kept] = 1
    mask = interpolate(torch.from_numpy(shown).view(1, 1, *grid), size=picture.shape[-2:])
    small = decode_pictures(vae, encode_pictures(vae, shrink(picture, grid, factor))).float().clamp(-1, 1)
    large = interpolate(small, size=picture.shape[-2:], mode="bicubic", align_corners=False)
    return torch.lerp(large.clamp(-1, 1), picture.float(), mask.to(picture.device))
