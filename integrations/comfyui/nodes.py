"""The nodes, as ComfyUI shows them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import folder_paths
import numpy as np
import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import ComfyExtension, io, ui
from PIL import Image
from server import PromptServer

from .card import card
from .library import library
from .words import (
    COVERAGES,
    KEEP_HERE,
    MEANINGS,
    OVERVIEWS,
    SELECTORS,
    TASKS,
    TIPS,
)

CATEGORY = "model/patch/sparse_context"
MOST = 10  # pictures, masks
MaskIO = io.Custom("SPARSE_CONTEXT_MASK")


class SparseContext(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        tip = TIPS["SparseContext"]
        images = [f"image{i}" for i in range(1, MOST + 1)]
        masks = [f"mask{i}" for i in range(1, MOST + 1)]
        return io.Schema(
            node_id="SparseContext",
            display_name="Sparse Context",
            category=CATEGORY,
            description=tip["description"],
            search_aliases=["reference tokens", "faster edit", "token pruning", "flux kontext speed", "klein speed"],
            inputs=[
                io.Model.Input("model", tooltip=tip["model"]),
                io.Float.Input(
                    "keep",
                    default=0.2,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    display_mode=io.NumberDisplay.slider,
                    tooltip=tip["keep"],
                ),
                io.Combo.Input("task", options=[*TASKS], default="auto", tooltip=tip["task"]),
                io.Combo.Input("selector", options=[*SELECTORS], default="auto", tooltip=tip["selector"]),
                io.String.Input(
                    "phrases",
                    default="",
                    multiline=True,
                    tooltip=tip["phrases"],
                    placeholder="what you mean, such as: the red car",
                ),
                io.String.Input("text_model", default="", tooltip=tip["text_model"], advanced=True),
                io.String.Input(
                    "keep_each", default="", tooltip=tip["keep_each"], placeholder="0.5, 0.1", advanced=True
                ),
                io.Combo.Input(
                    "coverage", options=[*COVERAGES], default="auto", tooltip=tip["coverage"], advanced=True
                ),
                io.Combo.Input(
                    "overview", options=[*OVERVIEWS], default="trained", tooltip=tip["overview"], advanced=True
                ),
                io.Int.Input(
                    "selection_seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFF,
                    control_after_generate=False,
                    tooltip=tip["selection_seed"],
                    advanced=True,
                ),
                io.Vae.Input("vae", optional=True, tooltip=tip["vae"]),
                io.Autogrow.Input(
                    "images",
                    template=io.Autogrow.TemplateNames(io.Image.Input("image", tooltip=tip["images"]), images, min=0),
                    optional=True,
                    tooltip=tip["images"],
                ),
                io.Autogrow.Input(
                    "masks",
                    template=io.Autogrow.TemplateNames(MaskIO.Input("mask", tooltip=tip["masks"]), masks, min=0),
                    optional=True,
                    tooltip=tip["masks"],
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip=tip["out_model"]),
                io.Image.Output(display_name="kept", tooltip=tip["out_kept"]),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        keep: float,
        task: str,
        selector: str,
        phrases: str,
        text_model: str,
        keep_each: str,
        coverage: str,
        overview: str,
        selection_seed: int,
        vae: Any = None,
        images: Mapping[str, torch.Tensor] | None = None,
        masks: Mapping[str, Any] | None = None,
    ) -> io.NodeOutput:
        tell = tell_at(cls.hidden.unique_id)
        try:
            with library():
                from .building import build, read_settings
                from .patch import install
                from .records import read_records
            settings = read_settings(
                keep, keep_each, task, selector, coverage, overview, selection_seed, phrases, text_model
            )
            records, problems = read_records(cls.hidden.prompt or {}, cls.hidden.unique_id, folder_paths.get_full_path)
            for problem in problems:
                tell(problem)
            patch, picture = build(model, settings, images or {}, masks or {}, vae, records, tell)
            model = install(model, patch, WrappersMP.OUTER_SAMPLE, WrappersMP.DIFFUSION_MODEL)
        except (ValueError, ImportError) as error:
            sentence = f"{error} The model is returned unchanged."
            tell(sentence)
            picture = card(sentence)
        shown = as_image(picture)
        return io.NodeOutput(model, shown, ui=ui.PreviewImage(shown, cls=cls))


class SparseContextMask(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        tip = TIPS["SparseContextMask"]
        return io.Schema(
            node_id="SparseContextMask",
            display_name="Sparse Context Mask",
            category=CATEGORY,
            description=tip["description"],
            search_aliases=["keep region", "drop region", "reference mask"],
            inputs=[
                io.Mask.Input("mask", tooltip=tip["mask"]),
                io.Combo.Input("meaning", options=[*MEANINGS], default=KEEP_HERE, tooltip=tip["meaning"]),
                io.Int.Input("reference", default=1, min=1, max=MOST, tooltip=tip["reference"]),
            ],
            outputs=[MaskIO.Output(display_name="mask", tooltip=tip["out_mask"])],
        )

    @classmethod
    def execute(cls, mask: torch.Tensor, meaning: str, reference: int) -> io.NodeOutput:
        return io.NodeOutput({"mask": mask, "keeps": meaning == KEEP_HERE, "reference": reference})


class SparseContextReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        tip = TIPS["SparseContextReport"]
        return io.Schema(
            node_id="SparseContextReport",
            display_name="Sparse Context Report",
            category=CATEGORY,
            description=tip["description"],
            search_aliases=["tokens kept", "speed-up"],
            inputs=[
                io.Model.Input("model", tooltip=tip["model"]),
                io.Latent.Input("latent", tooltip=tip["latent"]),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip=tip["out_latent"]),
                io.String.Output(display_name="report", tooltip=tip["out_report"]),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: Any, latent: Any) -> io.NodeOutput:
        try:
            with library():
                from .patch import installed
            text = describe(installed(model))
        except ImportError as error:
            text = str(error)
        tell_at(cls.hidden.unique_id, logging.INFO)(text)
        return io.NodeOutput(latent, text, ui=ui.PreviewText(text))


class SparseContextExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [SparseContext, SparseContextMask, SparseContextReport]


def describe(patch: Any) -> str:
    """What the last run of a patch did; None: there is none."""
    if patch is None:
        return (
            "Nothing was dropped: connect the model output of the node Sparse Context here and to the sampler. If it "
            "is connected, that node says what did not fit."
        )
    return str(patch.last) or "The model has not run yet: connect the latent that comes out of the sampler."


def tell_at(node: str | None, level: int = logging.WARNING) -> Any:
    """A function that shows a sentence in a node, and in the log."""

    def tell(sentence: str) -> None:
        logging.log(level, "Sparse Context: %s", sentence)
        if node is not None:
            PromptServer.instance.send_progress_text(sentence, node)

    return tell


def as_image(picture: Image.Image) -> torch.Tensor:
    """A picture as ComfyUI has it, float (1, H, W, 3) in [0, 1]."""
    return torch.from_numpy(np.asarray(picture.convert("RGB"), np.float32) / 255)[None]
