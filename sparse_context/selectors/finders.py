"""Models that find what a phrase names: CLIPSeg, OWLv2, Grounding DINO and SAM 3, by transformers.

`find(picture, phrase)` says of each place of a picture whether it shows what the phrase names, in [0, 1], and keeps to
a fixed scale: where nothing is found, all of it is low. A kind of model is one function and one line in `KINDS`.
Nothing is downloaded unless a hub id was named. Only safetensors are read, and no code of a model's repository runs.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..layers import require

DEFAULT = "CIDAS/clipseg-rd64-refined"
DOWNLOAD = "603 MB, Apache-2.0"
FILES = ("*.json", "*.txt", "*.safetensors")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
TIMEOUT = 10  # seconds until the hub counts as out of reach

LEAST = 0.3
"""Of a soft map: where no token reaches this, the picture does not show what the phrase names."""

SAM3_SIDE, SAM3_WORDS = 1008, 32  # pixels a side, and tokens of a phrase, that SAM 3 takes

Find = Callable[[Image.Image, str], torch.Tensor]
"""(picture, phrase) -> (h, w) in [0, 1], which spans the picture, whatever its shape."""


@dataclass(frozen=True)
class Finder:
    """A model that is loaded. Several threads may call it; they wait for each other.

    find: of its kind. least: below this in every token, the picture does not show what was named.
    """

    find: Find
    least: float
    _turn: threading.Lock = field(default_factory=threading.Lock)  # tokenizers fail where two threads use one

    def __call__(self, image: np.ndarray, phrase: str) -> np.ndarray:
        """How much each place of a picture, uint8 RGB (H, W, 3), shows of the phrase: float32 (h, w) in [0, 1].

        Raises ValueError for a phrase that is longer than the model reads.
        """
        with self._turn, torch.inference_mode(), _without_autocast():
            return self.find(Image.fromarray(image), phrase).float().cpu().numpy()


@contextmanager
def _without_autocast() -> Any:
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


@dataclass(frozen=True)
class _Parts:
    """What a model is loaded from, of whatever kind: a folder; and where to."""

    folder: str
    device: str
    dtype: torch.dtype

    def load(self, cls: Any) -> Any:
        model = cls.from_pretrained(self.folder, dtype=self.dtype, use_safetensors=True, local_files_only=True)
        return model.eval().requires_grad_(False).to(self.device)

    def image_processor(self, cls: Any) -> Any:
        # Named by its class, so that it is the same whether torchvision is there or not
        return cls.from_pretrained(self.folder, local_files_only=True)

    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder, local_files_only=True)

    def to_device(self, inputs: Any) -> dict[str, Any]:
        return {
            name: value.to(self.device, self.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
        }


# One function for each kind of model ----------------------------------------------------------------------------------


def clipseg(parts: _Parts) -> Find:
    """Lüddecke, Ecker, "Image Segmentation Using Text and Image Prompts", CVPR 2022: soft scores of each pixel."""
    from transformers import CLIPSegForImageSegmentation, CLIPSegProcessor, ViTImageProcessorPil

    processor = CLIPSegProcessor(parts.image_processor(ViTImageProcessorPil), parts.tokenizer())
    model = parts.load(CLIPSegForImageSegmentation)

    def find(picture: Image.Image, phrase: str) -> torch.Tensor:
        check_length(processor.tokenizer, phrase, model.config.text_config.max_position_embeddings)
        inputs = processor(text=[phrase], images=[picture], return_tensors="pt")
        return model(**parts.to_device(inputs)).logits[0].float().sigmoid()

    return find


def owlv2(parts: _Parts) -> Find:
    """Minderer, Gritsenko, Houlsby, "Scaling Open-Vocabulary Object Detection", NeurIPS 2023: boxes."""
    from transformers import Owlv2ForObjectDetection, Owlv2ImageProcessorPil, Owlv2Processor

    processor = Owlv2Processor(parts.image_processor(Owlv2ImageProcessorPil), parts.tokenizer())
    model = parts.load(Owlv2ForObjectDetection)

    def find(picture: Image.Image, phrase: str) -> torch.Tensor:
        check_length(processor.tokenizer, phrase, model.config.text_config.max_position_embeddings)
        inputs = processor(text=[[phrase]], images=[picture], return_tensors="pt")
        size = picture.height, picture.width
        found = processor.post_process_grounded_object_detection(model(**parts.to_device(inputs)), target_sizes=[size])
        return fill_boxes(found[0]["boxes"], size)

    return find


def grounding_dino(parts: _Parts) -> Find:
    """Liu et al., "Grounding DINO", ECCV 2024: boxes."""
    from transformers import GroundingDinoForObjectDetection, GroundingDinoImageProcessorPil, GroundingDinoProcessor

    processor = GroundingDinoProcessor(parts.image_processor(GroundingDinoImageProcessorPil), parts.tokenizer())
    model = parts.load(GroundingDinoForObjectDetection)

    def find(picture: Image.Image, phrase: str) -> torch.Tensor:
        phrase = phrase.replace(".", " ").strip()  # a full stop would be the end of one phrase and begin another
        check_length(processor.tokenizer, f"{phrase}.", model.config.max_text_len)
        inputs = processor(images=[picture], text=[[phrase]], return_tensors="pt")
        size = picture.height, picture.width
        found = processor.post_process_grounded_object_detection(
            model(**parts.to_device(inputs)), inputs["input_ids"], target_sizes=[size]
        )
        return fill_boxes(found[0]["boxes"], size)

    return find


def sam3(parts: _Parts) -> Find:
    """Carion et al., "SAM 3: Segment Anything with Concepts", 2025: a mask of all that the phrase names.

    Its processor needs torchvision, which does nothing here but scale: the model's own inputs are made without it.
    """
    from transformers import Sam3Model

    tokenizer, model = parts.tokenizer(), parts.load(Sam3Model)

    def find(picture: Image.Image, phrase: str) -> torch.Tensor:
        check_length(tokenizer, phrase, SAM3_WORDS)
        words = tokenizer([phrase], padding="max_length", max_length=SAM3_WORDS, return_tensors="pt")
        side = getattr(model.config.vision_config.backbone_config, "image_size", SAM3_SIDE)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1
        pixels = F.interpolate(pixels, (side, side), mode="bilinear", antialias=True)
        said = model(**parts.to_device({"pixel_values": pixels, **words}))
        # What is there at all is told apart from where it would be
        return (said.semantic_seg.float().sigmoid() * said.presence_logits.float().sigmoid().view(-1, 1, 1, 1))[0, 0]

    return find


KINDS: dict[str, tuple[Callable[[_Parts], Find], float]] = {
    "clipseg": (clipseg, LEAST),
    "owlv2": (owlv2, 0.0),  # detectors have thresholds of their own
    "grounding-dino": (grounding_dino, 0.0),
    "sam3": (sam3, LEAST),
    "sam3_video": (sam3, LEAST),  # as facebook/sam3 is published: with a tracker beside it, which is not loaded
}
"""By the model type that a config.json names: how a model is loaded, and `Finder.least`."""


def fill_boxes(boxes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """1 inside the boxes, (n, 4) as left, top, right and bottom in pixels, and 0 elsewhere: (H, W)."""
    filled = torch.zeros(size)
    for left, top, right, bottom in boxes.round().int().tolist():
        filled[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)] = 1
    return filled


def check_length(tokenizer: Any, phrase: str, most: int) -> None:
    """Raise ValueError for a phrase that the model would cut."""
    count = len(tokenizer(phrase, verbose=False)["input_ids"])
    if count > most:
        raise ValueError(f"The phrase {phrase!r} has {count} tokens, and its model reads {most}: write a shorter one.")


# From a name to a model -----------------------------------------------------------------------------------------------


def locate(model: str | None) -> tuple[str, str]:
    """The folder of a model, and what tells its files from others: their names, sizes and times.

    A hub id is downloaded unless the cache has it. Raises ValueError where there is none, and ImportError without
    transformers.
    """
    require("transformers")
    folder = _cached_default() if model is None else _folder_of(model)
    files = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.suffix in (".json", ".safetensors")]
    return str(folder), repr([(str(folder), name, about.st_size, about.st_mtime_ns) for name, about in files])


def _cached_default() -> Path:
    folder = _in_cache(DEFAULT)
    if folder is None:
        raise ValueError(
            f"There is no model here that finds phrases: name one as text_model (--text-model), either {DEFAULT}, "
            f"which is downloaded then ({DOWNLOAD}), or the folder of a CLIPSeg, OWLv2, Grounding DINO or SAM 3."
        )
    return folder


def _folder_of(model: str) -> Path:
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if folder.exists() or not HUB_ID.fullmatch(model):
        raise ValueError(f"The model {model} is no folder: pass one that holds a config.json, or a hub id.")
    return _in_cache(model) or _download(model)


def _in_cache(model: str) -> Path | None:
    """The folder of a hub id in the cache; None where it is not there, or not with its weights."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(model, local_files_only=True))
    except Exception:  # not there, or no name that the hub would take, which a download says
        return None
    return folder if (folder / "config.json").is_file() and [*folder.glob("*.safetensors")] else None


def _download(model: str) -> Path:
    from huggingface_hub import errors, model_info, snapshot_download

    try:
        model_info(model, timeout=TIMEOUT)  # `snapshot_download` would try for half a minute when offline
        return Path(snapshot_download(model, allow_patterns=[*FILES]))
    except Exception as error:  # also kinds of the HTTP library that the client happens to use
        reasons: dict[type[Exception], str] = {
            errors.GatedRepoError: "accept its terms there first, and log in with `hf auth login`",
            errors.RepositoryNotFoundError: "no model has this name, or it is private: log in with `hf auth login`",
        }
        reason = reasons.get(type(error), f"check the connection ({_one_line(error)})")
        raise ValueError(
            f"The model {model} is not a local folder, and the hub does not provide it: {reason}."
        ) from error


_LOADING = threading.Lock()


def load_finder(folder: str, about: str, device: str, dtype: str) -> Finder:
    """The model in a folder, read once for each state of its files (`locate`), device and type.

    Raises ValueError for one that cannot be read, or is of no kind of `KINDS`.
    """
    with _LOADING:
        return _load(folder, about, device, dtype)


@lru_cache(maxsize=2)
def _load(folder: str, about: str, device: str, dtype: str) -> Finder:
    from transformers import AutoConfig

    try:
        kind = AutoConfig.from_pretrained(folder, local_files_only=True).model_type
    except Exception as error:  # whatever its parts raise for what they do not know
        raise ValueError(f"The model {folder} has no config.json that can be read: {_one_line(error)}.") from error
    if kind not in KINDS:
        raise ValueError(
            f"The model {folder} is of type {kind!r}, which finds no phrases: pass one of {', '.join(KINDS)}."
        )
    make, least = KINDS[kind]
    try:
        return Finder(make(_Parts(folder, device, getattr(torch, dtype))), least)
    except ImportError as error:
        raise ValueError(
            f"The model {folder} needs a package that is not here, so pip install 'sparse-context[text]': "
            f"{_one_line(error)}."
        ) from error
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ValueError(f"The model {folder} does not load: {_one_line(error)}.") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
