"""The fields of requests, as JSON schemas: what is checked, and what the OpenAPI page says of them."""

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ..config import TASKS, SparseContextConfig
from ..overview import LAYOUTS
from ..selectors.registry import SELECTORS
from .errors import ApiError
from .settings import Settings

Schema = dict[str, Any]

BUDGET: Schema = {
    "anyOf": [
        {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        {"type": "integer", "minimum": 2},
        {"type": "string", "enum": ["auto"]},
    ]
}
SELECTOR: Schema = {
    "anyOf": [
        {"type": "string", "enum": sorted(set(SELECTORS) - {"mask"})},
        {"type": "object", "minProperties": 1, "additionalProperties": {"type": "number", "exclusiveMinimum": 0}},
    ]
}

CONFIG: dict[str, Schema] = {
    "keep": {
        "description": "Tokens to keep: a ratio, a count or auto; or a list of these, one for each image.",
        **BUDGET,
    },
    "selector": {"description": "What makes a token matter: a name, or names with weights; or a list.", **SELECTOR},
    "task": {"description": "Sets selector and coverage that are not named.", "type": "string", "enum": list(TASKS)},
    "phrases": {
        "description": "What is meant in each image, such as the red car: one text, or a list with null for none.",
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": ["string", "null"]}}, {"type": "null"}],
    },
    "coverage": {"description": "Share of the kept tokens to spread evenly.", **{"type": "number", "maximum": 1}},
    "overview_layout": {"type": "string", "enum": list(LAYOUTS)},
    "share": {"type": "string", "enum": ["equal", "joint"]},
    "floor": {"description": "Fewest tokens of each image.", "type": "integer", "minimum": 0, "maximum": 10_000},
}
"""What the page says of fields of `SparseContextConfig`, which checks them itself; of others it says nothing."""


def config_fields() -> dict[str, str]:
    """The fields of `SparseContextConfig`, by the name that they have in a request. Which models are loaded is not for
    clients to say."""
    return {
        "selection_seed" if field.name == "seed" else field.name: field.name
        for field in fields(SparseContextConfig)
        if field.name != "text_model"
    }


SUBJECTS = {
    **{field: name for name, field in config_fields().items()},
    **{name: name for name in ("prompt", "seed", "guidance_scale", "negative_prompt", "size", "reference_masks")},
    "steps": "num_inference_steps",
    "height": "size",
    "width": "size",
    "references": "image",
    "inpaint": "mask",
}
"""The words by which the library's errors name what is a field here."""

NO_EFFECT = ("quality", "moderation", "user", "safety_identifier")
"""Taken because clients send them. They change nothing, and nothing of them is kept."""

REFUSED = {
    **dict.fromkeys(("url", "image_url", "images"), "this server fetches nothing: send pictures as files named image"),
    **dict.fromkeys(("markup", "svg", "frame_count", "frame_duration_ms", "complexity", "style"), "leave it out"),
    "true_cfg_scale": "its name is guidance_scale here",
    "output_quality": "its name is output_compression here",
    "mask_image": "its name is mask here",
    "reference_image": "send it as a further image",
}
"""What others take, and what to do instead."""


def plain_fields(settings: Settings) -> dict[str, Schema]:
    """The fields that `/v1/images/generations` takes; `/v1/images/edits` takes `EDITS` and files too."""
    whole = {"type": "integer"}
    return {
        "prompt": {"description": "What to make.", "type": "string", "minLength": 1, "maxLength": settings.prompt},
        "model": {"description": "The model's id, or nothing.", "type": "string"},
        "n": {"description": "Pictures.", **whole, "minimum": 1, "maximum": settings.pictures, "default": 1},
        "size": {
            "description": "pass WIDTHxHEIGHT in pixels, or auto",
            "type": "string",
            "pattern": r"auto|[1-9]\d{0,4}x[1-9]\d{0,4}",
            "default": "auto",
        },
        "response_format": {"type": "string", "enum": ["b64_json"], "default": "b64_json"},
        "output_format": {"type": "string", "enum": ["png", "jpeg", "webp"], "default": "png"},
        "output_compression": {
            "description": "Quality of jpeg and webp.", **whole, "minimum": 0, "maximum": 100, "default": 100
        },
        "background": {"type": "string", "enum": ["auto", "opaque"], "default": "auto"},
        "stream": {"description": "Answer by events.", "type": "boolean", "default": False},
        "partial_images": {"description": "Pictures on the way.", **whole, "minimum": 0, "maximum": 3, "default": 0},
        "seed": {"description": "Of the noise; random without one.", **whole, "minimum": 0, "maximum": 2**63 - 1},
        "num_inference_steps": {"description": "Denoise steps.", **whole, "minimum": 1, "maximum": settings.most_steps},
        "guidance_scale": {"description": "For models with guidance.", "type": "number", "minimum": 0, "maximum": 100},
        "negative_prompt": {"description": "For models with guidance.", "type": "string", "maxLength": settings.prompt},
        **{name: {"description": "Has no effect.", "type": "string", "maxLength": 1000} for name in NO_EFFECT},
    }  # fmt: skip


EDITS: dict[str, Schema] = {
    "input_fidelity": {
        "description": "The budget by a word: low is the server's.",
        "type": "string",
        "enum": ["low", "high"],
    },
}
FILES = ("image", "mask", "reference_masks")


def known_fields(settings: Settings, edits: bool) -> dict[str, Schema]:
    """All fields of a request but files."""
    more = {**EDITS, **{name: CONFIG.get(field, {}) for name, field in config_fields().items()}} if edits else {}
    return plain_fields(settings) | more


def check_names(names: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Raise `ApiError` for a field that there is not, with what was meant if that can be told."""
    for name in names:
        if name in REFUSED and name not in known:
            raise ApiError(400, f"{name} is not taken: {REFUSED[name]}.", param=name, code="unknown_field")
        if name not in known:
            near = difflib.get_close_matches(name[:100], known, n=1)
            advice = f"did you mean {near[0]}?" if near else "leave it out."
            raise ApiError(400, f"There is no field {name[:100]!r}: {advice}", param=name[:100], code="unknown_field")
