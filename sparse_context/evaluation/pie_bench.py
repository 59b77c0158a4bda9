"""PIE-Bench (Ju et al., ICLR 2024; arXiv 2310.01506): a reader of its folder, and its metrics by their own names.

The folder is the one that the authors hand out: `mapping_file.json` and `annotation_images/`. Each entry has a picture
of 512x512 pixels, a caption of it and one of the edited picture (words that change in square brackets), an instruction,
a kind of edit, where the edit happens, as runs: [start, length, start, length, ...] over the pixels row by row, and
mostly the word for it, in either caption.
"""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..samples import find_picture
from .benchmark import Benchmark, BenchmarkSample
from .metrics import CLIP_MODEL, METRICS, Metric, Picture, clip_t, lpips, mse, only_inside, psnr, ssim, st_lpips
from .networks import IMAGENET_MEAN, IMAGENET_SPREAD, LPIPS_MODEL, accelerator, vision

SIDE = 512
EDIT_TYPES = (
    "random",
    "change object",
    "add object",
    "delete object",
    "change content",
    "change pose",
    "change colour",
    "change material",
    "change background",
    "change style",
)
"""What `editing_type_id` 0 to 9 stands for."""


def read_pie_bench(folder: str | Path) -> list[BenchmarkSample]:
    """The samples of a PIE-Bench folder, in its order: no truth, the kind of edit as task, the edit's mask, and as
    phrase the first of the two `blended_word`, which is that of the source.

    Raises ValueError, in one sentence, for a folder of another kind and for an entry that is not as described.
    """
    listing = Path(folder) / "mapping_file.json"
    try:
        entries = json.loads(listing.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{folder} is no PIE-Bench folder: its mapping_file.json cannot be read ({error}); get the benchmark from "
            "github.com/cure-lab/PnPInversion."
        ) from error
    if not isinstance(entries, dict) or not entries:
        raise ValueError(f"{listing} holds no entries: it has to be one object with an entry for each picture.")
    return [_sample(key, entry, Path(folder), listing) for key, entry in entries.items()]


def _sample(key: str, entry: Any, folder: Path, listing: Path) -> BenchmarkSample:
    try:
        caption, source_caption = (
            entry[name].replace("[", "").replace("]", "") for name in ("editing_prompt", "original_prompt")
        )
        prompt = entry.get("editing_instruction") or caption
        image = find_picture(entry["image_path"], folder / "annotation_images")
        kind = dict(enumerate(EDIT_TYPES))[int(entry["editing_type_id"])]
        mask = decode_mask(entry["mask"])
        words = entry.get("blended_word", "").split()
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{listing}, entry {key}, is not as in PIE-Bench: {what}.") from error
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "png")
    return BenchmarkSample(
        key,
        prompt,
        (image,),
        reference_masks=(file.getvalue(),),
        task=kind,
        phrases=(words[0] if words else None,),
        caption=caption,
        source_caption=source_caption,
    )


def decode_mask(runs: Any, side: int = SIDE) -> np.ndarray:
    """Runs [start, length, ...] over a square, row by row -> uint8 (side, side), 255 inside.

    As in the authors' code a run is cut at the end of the picture, and its outermost rows and columns count as edited,
    because the annotation errs there. Raises ValueError for an odd or negative list.
    """
    values = np.asarray(runs, dtype=np.float64).reshape(-1)
    if len(values) % 2 or (values < 0).any() or (values % 1).any():
        raise ValueError("the mask is no list of start and length, start and length")
    mask = np.zeros((side, side), np.uint8)
    for start, length in values.astype(np.int64).reshape(-1, 2).tolist():
        mask.reshape(-1)[start : start + length] = 255
    mask[[0, -1]] = 255
    mask[:, [0, -1]] = 255
    return mask


# Its metrics: everything but the part that is compared is made black, as the authors do -------------------------------


def _unedited(function: Any):
    """`function` of two pictures outside the mask; nan where the mask is everything."""

    def outside(output: Picture, source: Picture, mask: Any, **model: str) -> float:
        if mask is None:
            return function(output, source, None, **model)
        rest = 255 - np.asarray(mask)
        return (
            function(only_inside(output, rest), only_inside(source, rest), None, **model)
            if rest.any()
            else float("nan")
        )

    return outside


def clip_similarity(output: Picture, caption: str, mask: Any = None, *, model: str) -> float:
    """100 times the cosine of CLIP's embeddings of a picture and its caption, at least 0, as CLIPScore has it."""
    return max(0.0, 100 * clip_t(output, caption, mask, model=model))


@torch.inference_mode()
def structure_distance(output: Picture, source: Picture, mask: Any = None, *, model: str) -> float:
    """How far the layout moved: the mean squared difference of the self-similarities of DINO's last keys.

    (Tumanyan et al. 2022, Splice.) Pictures go in at the model's own size, 224 for facebook/dino-vitb8, and with values
    from 0 to 255, as the benchmark's own code has it: with values up to 1, figures would be others than those that were
    published.
    """
    net, _ = vision(model)
    last = [module for name, module in net.named_modules() if name.endswith(("k_proj", "attention.key"))][-1]
    similarity = []
    for picture in (output, source):
        values = np.array(picture.convert("RGB") if isinstance(picture, Image.Image) else picture)
        x = torch.from_numpy(values).permute(2, 0, 1)[None].to(accelerator()).float()
        x = F.interpolate(x, (net.config.image_size,) * 2, mode="bilinear", antialias=True)
        mean, spread = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_SPREAD))
        keys: list[torch.Tensor] = []
        hook = last.register_forward_hook(lambda module, args, layer: keys.append(layer[0]))  # noqa: B023
        try:
            net(pixel_values=(x - mean) / spread)
        finally:
            hook.remove()
        unit = F.normalize(keys[0], dim=-1)
        similarity.append(unit @ unit.T)
    return F.mse_loss(similarity[0], similarity[1]).item()


DINO_MODEL = "a DINO such as facebook/dino-vitb8"

PIE_METRICS: dict[str, Metric] = {
    "psnr_unedit_part": Metric(_unedited(psnr), against="source"),
    "ssim_unedit_part": Metric(_unedited(ssim), against="source"),
    "mse_unedit_part": Metric(_unedited(mse), against="source", better="lower"),
    "lpips_unedit_part": Metric(
        _unedited(lpips), against="source", better="lower", model=LPIPS_MODEL, packages=METRICS["lpips"].packages
    ),
    "structure_distance": Metric(structure_distance, against="source", better="lower", masked=False, model=DINO_MODEL),
    # of the benchmark alone: no output changes it
    "clip_similarity_source_image": Metric(clip_similarity, against="caption", masked=False, model=CLIP_MODEL),
    "clip_similarity_target_image": Metric(clip_similarity, against="prompt", masked=False, model=CLIP_MODEL),
    "clip_similarity_target_image_edit_part": Metric(clip_similarity, against="prompt", model=CLIP_MODEL),
    # not of the benchmark, but it needs nothing to be downloaded
    "st_lpips_unedit_part": Metric(
        _unedited(st_lpips), against="source", better="lower", packages=METRICS["st_lpips"].packages
    ),
}

PIE_BENCH = Benchmark(read_pie_bench, PIE_METRICS)
