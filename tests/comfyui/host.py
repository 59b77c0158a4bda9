"""What ComfyUI does around the patch, with plain tensors: the contract that the nodes rely on.

Every token can be told apart: that of the output at place n has the number n, that of reference i (from 0) the number
1000 * (i + 1) + n. `test_core.py` holds the same patch to a real core.
"""

from types import SimpleNamespace

import torch
from sparse_context_nodes.choosing import References, choose, needs_details
from sparse_context_nodes.families import FAMILIES
from sparse_context_nodes.patch import COUNTS, SparsePatch

TEXT, OUTPUT, WIDTH = 5, 12, 4


class KV_Attn_Input:  # noqa: N801 (ComfyUI's name, by which the patch knows it)
    """The part of FluxKVCache that is on attention: filled after the first step."""

    def __init__(self, cache):
        self.cache = cache


def make_patch(settings, references=None, kind="flux2", trained=None, told=None):
    """A patch as the node makes it."""
    references = references or References()

    def chooser(grids, details, kv):
        return choose(settings, references, grids, details, trained)

    return SparsePatch(
        chooser,
        FAMILIES[kind],
        1 if kind == "flux2" else 2,
        ([] if told is None else told).append,
        needs_details(settings, references),
    )


class Host:
    """One model: its forwards go through the patch, and it keeps what came out of the last one."""

    def __init__(self, patch, cache=None, cut_before=False):
        self.patch, self.cut_before = patch, cut_before
        self.options = {"patches": {"attn1_patch": [KV_Attn_Input(cache)]}} if cache is not None else {}

    def __call__(self, latents, batch=1):
        """One forward. latents: of the references."""
        x = torch.zeros(batch, 4, 3, 4)
        executor = Executor(self._forward)
        context = torch.zeros(batch, TEXT, WIDTH)
        self.patch.forward(executor, x, torch.ones(batch), context, None, None, latents, None, self.options)
        return self.seen

    def _forward(self, x, timestep, context, y, guidance, ref_latents, control, transformer_options, **kwargs):
        batch, patch = x.shape[0], self.patch.patch
        options, numbers, ids = dict(transformer_options), [torch.arange(OUTPUT)], [grid_ids(0, (3, 4))]
        if ref_latents is not None:
            grids = [(-(-each.shape[-2] // patch), -(-each.shape[-1] // patch)) for each in ref_latents]
            options[COUNTS] = [rows * columns for rows, columns in grids]
            for i, grid in enumerate(grids):
                numbers.append(1000 * (i + 1) + torch.arange(grid[0] * grid[1]))
                ids.append(grid_ids(10 * (i + 1), grid))
        img = torch.cat(numbers).float()[None, :, None].expand(batch, -1, WIDTH)
        if self.cut_before:  # FluxKVCache on later steps, where its patch comes first
            img = img[:, :OUTPUT]
        self.given = {
            "img": img,
            "txt": torch.zeros(batch, TEXT, WIDTH),
            "img_ids": torch.cat(ids)[None].expand(batch, -1, -1),
            "txt_ids": torch.zeros(batch, TEXT, 4),
            "transformer_options": options,
        }
        self.seen = SimpleNamespace(**self.patch(dict(self.given)), latents=ref_latents)
        return x


class Executor:
    """ComfyUI's, with the model behind it."""

    def __init__(self, original):
        self.original = original

    def __call__(self, *args, **kwargs):
        return self.original(*args, **kwargs)


def grid_ids(index, grid):
    """Position ids (rows * columns, 4) as FLUX.2 has them: of reference 1 at 10, of reference 2 at 20."""
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    parts = [torch.full(grid, index), rows, columns, torch.zeros(grid)]
    return torch.stack([part.flatten().float() for part in parts], dim=-1)


def latents(*grids, patch=1, batch=1, seed=0):
    """Random latents of references with so many tokens."""
    generator = torch.Generator().manual_seed(seed)
    channels = 128 if patch == 1 else 16
    return [torch.randn(batch, channels, rows * patch, columns * patch, generator=generator) for rows, columns in grids]


def numbers(seen):
    """The numbers of the tokens that came out, and their position ids."""
    return seen.img[0, :, 0].long().tolist(), seen.img_ids[0]
