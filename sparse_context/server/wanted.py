"""From the fields of a request to what is to be made, and how it is to be sent."""

import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..config import SparseContextConfig
from ..images import WRITE_FORMATS
from ..pipelines.spec import Request
from ..texts import read_word
from .errors import ApiError, from_exception
from .fields import check, from_text
from .schema import SUBJECTS, check_names, config_fields, known_fields
from .settings import Settings

WEBP_SIDE = WRITE_FORMATS[".webp"][2]

SENTENCES = {
    (
        "response_format",
        "url",
    ): "response_format is 'url', but this server keeps no pictures to link to: pass b64_json.",
    ("background", "transparent"): "background is 'transparent', but the model paints opaque pictures: leave it out.",
    ("output_format", "gif"): "output_format is 'gif': choose one of png, jpeg, webp.",
}
"""Values that clients send and that are refused in words of their own."""


@dataclass(frozen=True)
class Wanted:
    """A request that was understood.

    request: without the pictures, and with the first seed. seeds: one for each picture; is_seeded: whether the client
    named them. format, compression: of the pictures. stream, partials: whether events are sent, and pictures on the
    way.
    """

    request: Request
    seeds: tuple[int, ...]
    is_seeded: bool
    format: str
    compression: int
    stream: bool
    partials: int

    def digest(self, *more: str) -> str:
        """Equal for requests that ask for the same, whatever the seed that they left to the server."""
        seeds = self.seeds if self.is_seeded else len(self.seeds)
        return _digest(self.request.prompt, seeds, self.partials, self._alike(), *more)

    def alike(self, *more: str) -> str:
        """Equal for requests that differ in prompt and seeds alone."""
        return _digest(self._alike(), *more)

    def _alike(self) -> str:
        request = self.request
        return repr(
            (
                request.config,
                request.steps,
                request.height,
                request.width,
                request.guidance_scale,
                request.negative_prompt,
            )
        )


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode("utf-8", "backslashreplace")).hexdigest()


def read_wanted(values: Mapping[str, Any], settings: Settings, edits: bool, is_form: bool) -> Wanted:
    """What a request asks for. values: its fields but for files.

    edits: whether it is about references. is_form: whether its numbers are texts. Raises `ApiError` that names the
    field.
    """
    known, of_config = known_fields(settings, edits), config_fields() if edits else {}
    check_names(values, known)
    read: dict[str, Any] = {}
    for name, value in values.items():
        if is_form and (name in of_config or known[name].get("type") != "string"):
            value = from_text(value)
        if value is None and name not in of_config:  # as JSON clients write what they do not mean
            continue
        if isinstance(value, str) and (name, value) in SENTENCES:
            raise ApiError(400, SENTENCES[name, value], param=name)
        read[name] = check(name, value, {} if name in of_config else known[name])
    _check_model(read.get("model"), settings)
    if "prompt" not in read:
        raise ApiError(400, "There is no prompt: say what to make.", param="prompt", code="missing_field")

    def default(name: str) -> Any:
        return read.get(name, known[name].get("default"))

    count, stream, output_format = default("n"), default("stream"), default("output_format")
    if stream and count > 1:
        raise ApiError(400, f"stream is true and n is {count}: pictures are streamed one at a time.", param="n")
    if default("partial_images") and not stream:
        raise ApiError(400, "partial_images needs stream: pass stream=true.", param="partial_images")
    if default("output_compression") != 100 and output_format == "png":
        raise ApiError(
            400, "output_compression is for jpeg and webp: name one as output_format.", param="output_compression"
        )
    seed = read.get("seed")
    first = secrets.randbelow(2**31) if seed is None else seed
    if first + count > 2**63:
        raise ApiError(400, f"seed is {first} and n {count}: each picture takes the next seed, so pass a smaller one.")
    try:
        told = {
            "steps": read.get("num_inference_steps"),
            "guidance_scale": read.get("guidance_scale"),
            "negative_prompt": read.get("negative_prompt"),
            **_size(default("size"), output_format, settings),
        }
        call = {**settings.call, **{name: value for name, value in told.items() if value is not None}}
        config = read_config(read, settings) if edits else settings.config
        request = Request(read["prompt"], (), config, seed=first, **call)
    except ValueError as error:
        raise from_exception(error, SUBJECTS) or error from None
    return Wanted(
        request,
        tuple(range(first, first + count)),
        seed is not None,
        output_format,
        default("output_compression"),
        stream,
        default("partial_images"),
    )


def read_config(read: Mapping[str, Any], settings: Settings) -> SparseContextConfig:
    """What to keep: as the fields say it, else as the server does. Raises ValueError for what no config takes."""
    given = {field: read_word(field, read[name]) for name, field in config_fields().items() if name in read}
    fidelity = read.get("input_fidelity")
    if fidelity and "keep" in given:
        raise ApiError(
            400,
            f"keep is {given['keep']!r} and input_fidelity {fidelity!r}: leave one of the two out.",
            param="input_fidelity",
        )
    if fidelity == "high":
        given["keep"] = settings.keep_high
    return replace(settings.config, **given)


def _check_model(model: str | None, settings: Settings) -> None:
    if model is not None and model != settings.name:
        raise ApiError(
            404,
            f"There is no model {model[:100]!r}: this server has {settings.name!r}.",
            param="model",
            code="model_not_found",
        )


def _size(text: str, output_format: str, settings: Settings) -> dict[str, int]:
    """Width and height in pixels; nothing of "auto", which is the server's or the model's."""
    if text == "auto":
        return {}
    width, height = map(int, text.split("x"))
    if output_format == "webp" and max(width, height) > WEBP_SIDE:
        raise ApiError(
            400, f"size is {text}, and webp holds {WEBP_SIDE} pixels a side: choose png or jpeg.", param="size"
        )
    if width * height > settings.output_pixels:
        raise ApiError(400, f"size is {text}: pass {settings.output_pixels} pixels at most.", param="size")
    return {"width": width, "height": height}
