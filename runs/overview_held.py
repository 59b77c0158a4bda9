"""What the tokens of a reference hold: an upper bound on what any model can make of them.

    python runs/overview_held.py [--scenes 64] [--learnt-from 1200] [--assets checkpoints/assets.safetensors]

On references of the embedded model's validation scenes, whole pictures, in dB. An overview holds a small picture only
as well as the VAE gives it back, so it is compared with the small picture itself, and with the best that any linear
code of as many numbers does: principal components of the pixels under one token. Another figure is what a linear map
reads from an overview's tokens, each with its eight neighbours: what a model reaches without any depth. Code and map
are fitted to training scenes. The last figures are of what nothing here does yet: an overview by 4, and where it is
wrong not only sharp tokens but also those of an overview by 2, whichever takes away more of the error.

It needs the scenes' objects: `python -m recipes.mini data`.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from tables import draw, machine, read, table
from torch.nn.functional import interpolate, pad, unfold
from tqdm import trange

from recipes.mini.data import load_assets
from recipes.mini.model import decode_pictures, encode_pictures
from recipes.mini.overview_gates import Gate, tokens_of
from recipes.mini.overview_sets import composite
from recipes.mini.run_folder import to_tensor
from recipes.mini.scenes import TOKEN, make_scene
from sparse_context.overview import shrink
from sparse_context.pipelines.load import load
from sparse_context.pipelines.spec import ModelSpec
from sparse_context.result import checkout, write_result

ROOT = Path(__file__).resolve().parents[1]
SETS = ((4, 0.0625), (4, 0.1), (4, 0.2), (4, 0.3), (2, 0.25), (2, 0.3))
"""Factor of the overview, and the share of all tokens, overview included; the sharp ones lie where it is wrong."""
TASK = "edit_global"
SCALES = (4, 2)
"""Of the two overviews that share a budget, the coarse one whole."""
SHARED = (0.1, 0.2, 0.3)
"""What they and the sharp tokens take of all tokens together."""
FIRST_LEARNT = 100_000  # seed of the first training scene

# Tables ---------------------------------------------------------------------------------------------------------------


def held() -> str:
    """What each set of tokens holds, and the same if the overview held every pixel of the small picture."""
    result = read("overview_held")
    rows = [
        [f"{row['keep']:.4g}", f"by {row['factor']}", f"{row['pixels']:.1f}", f"{row['tokens']:.1f}"]
        for row in result["figures"]["sets"]
    ]
    return (
        table(["tokens kept", "overview", "small picture, dB", "its tokens, dB"], rows)
        + f"\n\nAll tokens hold {result['figures']['whole']:.1f} dB. {machine(result)}"
    )


def codes() -> str:
    """An overview alone: as the VAE codes it, as the best linear code does, and as a linear map reads it."""
    rows = [
        [f"by {row['factor']}", f"{row['tokens']:.1f}", f"{row['components']:.1f}", f"{row['linear_map']:.1f}"]
        for row in read("overview_held")["figures"]["alone"]
    ]
    return table(["overview", "its tokens, dB", "as many components, dB", "read by a linear map, dB"], rows)


def scales() -> str:
    """An overview by 4 and sharp tokens, against the same with tokens of an overview by 2 among them."""
    rows = [
        [f"{row['keep']:g}", f"{row['one']:.1f}", f"{row['two']:.1f}", f"{row['middle']:.1f}", f"{row['sharp']:.1f}"]
        for row in read("overview_held")["figures"]["scales"]
    ]
    return table(["tokens kept", "by 4, dB", "by 4 and by 2, dB", "tokens of by 2", "sharp tokens"], rows)


TABLES = {"overview_held": held, "overview_held-codes": codes, "overview_held-scales": scales}

# The run --------------------------------------------------------------------------------------------------------------


def decibels(pictures: torch.Tensor, truth: torch.Tensor) -> float:
    """Mean over the pictures, (B, 3, H, W) in [-1, 1]."""
    error = ((pictures.clamp(-1, 1) - truth) / 2).square().mean((1, 2, 3))
    return round(float((-10 * torch.log10(error)).mean()), 2)


def areas(picture: torch.Tensor, size: int) -> torch.Tensor:
    """(B, C, H, W) -> (B * areas, C * size * size): squares of `size` a side, by rows."""
    return unfold(picture, size, stride=size).transpose(1, 2).flatten(0, 1)


def whole(parts: torch.Tensor, like: torch.Tensor, size: int) -> torch.Tensor:
    """The inverse of `areas`, for a picture of the size of `like`."""
    parts = parts.unflatten(0, (len(like), -1)).transpose(1, 2)
    return torch.nn.functional.fold(parts, like.shape[-2:], size, stride=size)


def components(learnt: torch.Tensor, pictures: torch.Tensor, size: int, count: int) -> torch.Tensor:
    """The pictures as `count` principal components an area hold them; the components are those of `learnt`."""
    samples = areas(learnt, size)
    mean = samples.mean(0)
    basis = torch.linalg.eigh((samples - mean).T @ (samples - mean)).eigenvectors[:, -count:]
    return whole((areas(pictures, size) - mean) @ basis @ basis.T + mean, pictures, size)


def with_neighbours(overview: torch.Tensor) -> torch.Tensor:
    """(B, C, rows, columns) -> (B * rows * columns, 9 C + 1): each token, its neighbours, and a one."""
    near = unfold(pad(overview, (1, 1, 1, 1), mode="replicate"), 3).transpose(1, 2).flatten(0, 1)
    return torch.cat([near, torch.ones(len(near), 1)], 1)


def share(coarse: np.ndarray, fine: np.ndarray, count: int) -> np.ndarray:
    """Which overview shows each cell, int64 like `coarse`: a factor of `SCALES`, or 1 where the cell is sharp.

    coarse, fine: the squared error of the two overviews in each cell. count: tokens beside the coarse overview. Each
    goes where it takes away most: a sharp one the error of its cell, one of the finer overview what that does better in
    the cells that it covers.
    """
    (large, small), left = SCALES, coarse.copy()
    shown = np.full(coarse.shape, large)
    blocks = (coarse.shape[0] // small, small, coarse.shape[1] // small, small)
    for _ in range(count):
        free = (shown == large).reshape(blocks).all((1, 3))
        better = np.where(free, (left - fine).reshape(blocks).sum((1, 3)), -np.inf)
        if better.max() > left.max():
            row, column = np.unravel_index(better.argmax(), better.shape)
            cells = np.s_[small * row : small * (row + 1), small * column : small * (column + 1)]
            shown[cells], left[cells] = small, fine[cells]
        else:
            cell = np.unravel_index(left.argmax(), left.shape)
            shown[cell], left[cell] = 1, 0
    return shown


def cell_errors(pictures: torch.Tensor, truth: torch.Tensor, grid: tuple[int, int]) -> np.ndarray:
    """The mean squared error of one picture (1, 3, H, W) in each cell, (rows, columns)."""
    error = (pictures - truth).square().mean((0, 1))
    return error.reshape(grid[0], TOKEN, grid[1], TOKEN).mean((1, 3)).numpy()


@torch.no_grad()
def measure(scenes: int, learnt_from: int, assets_file: Path) -> dict[str, object]:
    """The figures, from the package's VAE."""
    assets = load_assets(assets_file)
    vae = load(ModelSpec(dtype="float32", device="cpu")).vae
    validation, training = assets.split("validation"), assets.split("train")
    chosen = [make_scene(validation, TASK, seed) for seed in range(scenes)]
    truth = to_tensor([scene.references[0] for scene in chosen])
    many = trange(learnt_from, desc="training scenes", unit="scene")
    learnt = to_tensor([make_scene(training, TASK, FIRST_LEARNT + seed).references[0] for seed in many])
    grid = truth.shape[-2] // TOKEN, truth.shape[-1] // TOKEN

    def encoded(pictures: torch.Tensor) -> torch.Tensor:
        return torch.cat([encode_pictures(vae, part) for part in pictures.split(50)])

    def enlarged(pictures: torch.Tensor) -> torch.Tensor:
        return interpolate(pictures, size=truth.shape[-2:], mode="bicubic", align_corners=False).clamp(-1, 1)

    sets = []
    for factor, keep in SETS:
        ideal, real = [], []
        for scene, picture in zip(chosen, truth.split(1), strict=True):
            kept = tokens_of(Gate("student", factor, keep), scene).kept
            sharp = torch.zeros(grid[0] * grid[1])
            sharp[torch.from_numpy(kept)] = 1
            mask = interpolate(sharp.view(1, 1, *grid), size=picture.shape[-2:])
            ideal.append(torch.lerp(enlarged(shrink(picture, grid, factor)), picture, mask))
            real.append(composite(vae, picture, grid, factor, kept))
        figures = {"pixels": decibels(torch.cat(ideal), truth), "tokens": decibels(torch.cat(real), truth)}
        sets.append({"factor": factor, "keep": keep, **figures})
        print(f"{keep:g} of the tokens, overview by {factor}: {figures}")

    alone = []
    for factor in (4, 2):
        small, small_learnt = shrink(truth, grid, factor), shrink(learnt, grid, factor)
        codes, codes_learnt = encoded(small), encoded(small_learnt)
        fine = torch.cat(
            [encoded(enlarged(decode_pictures(vae, part))) for part in codes_learnt.split(50)]
        )  # what a reader should find
        near = with_neighbours(codes_learnt)
        ridge = 0.1 * torch.eye(near.shape[1])
        linear = torch.linalg.solve(near.T @ near + ridge, near.T @ areas(fine, factor))
        shape = torch.empty(len(truth), fine.shape[1], *grid)
        read_back = whole(with_neighbours(codes) @ linear, shape, factor)
        held_alone = torch.cat([composite(vae, part, grid, factor, np.zeros(0, np.int64)) for part in truth.split(1)])
        figures = {
            "tokens": decibels(held_alone, truth),
            "components": decibels(components(learnt, truth, factor * TOKEN, codes.shape[1]), truth),
            "linear_map": decibels(decode_pictures(vae, read_back), truth),
        }
        alone.append({"factor": factor, **figures})
        print(f"overview by {factor} alone: {figures}")

    shared, none = [], np.zeros(0, np.int64)
    for keep in SHARED:
        one, two, of_two = [], [], []
        for picture in truth.split(1):
            count = round(keep * grid[0] * grid[1]) - grid[0] * grid[1] // SCALES[0] ** 2
            errors = [cell_errors(enlarged(shrink(picture, grid, factor)), picture, grid) for factor in SCALES]
            drawn = {factor: composite(vae, picture, grid, factor, none) for factor in SCALES} | {1: picture}
            for found, fine in ((one, np.full(grid, np.inf)), (two, errors[1])):
                shown = share(errors[0], fine, count)
                masks = {factor: torch.from_numpy(shown == factor).view(1, 1, *grid).float() for factor in drawn}
                found.append(sum(interpolate(masks[f], size=picture.shape[-2:]) * part for f, part in drawn.items()))
            of_two.append([(shown == SCALES[1]).sum() / SCALES[1] ** 2, (shown == 1).sum()])
        middle, sharp = np.mean(of_two, 0)
        figures = {"one": decibels(torch.cat(one), truth), "two": decibels(torch.cat(two), truth)}
        shared.append({"keep": keep, **figures, "middle": float(middle), "sharp": float(sharp)})
        print(f"{keep:g} of the tokens, overviews of one and two scales: {shared[-1]}")
    everything = decibels(decode_pictures(vae, encoded(truth)), truth)
    return {"whole": everything, "sets": sets, "alone": alone, "scales": shared}


def main() -> None:
    parser = argparse.ArgumentParser(description="What the tokens of a reference hold, in dB.")
    parser.add_argument("--scenes", type=int, default=64, help="of the validation split")
    parser.add_argument("--learnt-from", type=int, default=1_200, help="training scenes for the code and the map")
    parser.add_argument("--assets", type=Path, default=ROOT / "checkpoints" / "assets.safetensors")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "overview_held.json")
    parser.add_argument("--table", action="store_true", help="only draw the tables of results/ again, from the JSON")
    arguments = parser.parse_args()
    checkout()  # of the code that runs, whatever is committed meanwhile
    if arguments.table:
        return draw(TABLES)
    figures = measure(arguments.scenes, arguments.learnt_from, arguments.assets)
    config = {"task": TASK, "scenes": arguments.scenes, "learnt_from": arguments.learnt_from}
    write_result(arguments.output, "overview_held", config, figures)
    draw(TABLES)
    print(held(), codes(), scales(), sep="\n\n")


if __name__ == "__main__":
    main()
