"""What is sent back: JSON as the official client reads it, with our report under a key of its own, or events."""

import asyncio
import base64
import io
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from PIL import Image

from .errors import ApiError
from .jobs import Done, Failed, Listener, Partial
from .wanted import Wanted

QUIET_SECONDS = 10.0
"""After so long without an event a comment is sent, so that nobody in between takes the connection for dead."""


def encode(image: Image.Image, format: str, compression: int) -> str:
    """A picture as base64 of a file without any metadata. compression: the quality of jpeg and webp, 0 to 100."""
    bare = Image.new(image.mode, image.size)
    bare.paste(image)
    file = io.BytesIO()
    options: dict[str, Any] = {} if format == "png" else {"quality": compression}
    if format == "jpeg":
        bare = bare.convert("RGB")
    bare.save(file, format=format.upper(), **options)
    return base64.b64encode(file.getvalue()).decode()


def report(done: Done) -> dict[str, Any]:
    """What was kept of the references, and where the time went."""
    selection = done.made[0].generation.selection
    return {
        "selection": None if selection is None else selection.to_dict(),
        "queue_seconds": done.queue_seconds,
        "pictures": [
            {"seed": made.seed, "together": made.together, "seconds": made.generation.to_dict()["seconds"]}
            for made in done.made
        ],
    }


def usage(done: Done) -> dict[str, Any]:
    """Tokens: in are the prompt's and those that were kept of the references, out are those of all pictures."""
    selection = done.made[0].generation.selection
    image_tokens = 0 if selection is None else selection.kept
    output_tokens = done.output_tokens * len(done.made)
    return {
        "input_tokens": done.text_tokens + image_tokens,
        "input_tokens_details": {"text_tokens": done.text_tokens, "image_tokens": image_tokens},
        "output_tokens": output_tokens,
        "total_tokens": done.text_tokens + image_tokens + output_tokens,
    }


def _about(image: Image.Image, wanted: Wanted) -> dict[str, Any]:
    return {
        "background": "opaque",
        "output_format": wanted.format,
        "size": f"{image.width}x{image.height}",
    }


def reply(done: Done, wanted: Wanted, request_id: str) -> bytes:
    """The whole answer as JSON. It encodes pictures, which takes a while: not for an event loop."""
    images = [made.generation.image for made in done.made]
    body = {
        "created": int(time.time()),
        "data": [{"b64_json": encode(image, wanted.format, wanted.compression)} for image in images],
        **_about(images[0], wanted),
        "usage": usage(done),
        "sparse_context": {"request_id": request_id, **report(done)},
    }
    return json.dumps(body).encode()


async def events(
    listener: Listener, due: float, late: ApiError, wanted: Wanted, kind: str, request_id: str
) -> AsyncIterator[bytes]:
    """The answer as server-sent events, the last of which is an error where there is none.

    due: when it is an error, by the loop's clock, and late: which one. kind: "image_edit" or "image_generation".
    """
    loop = asyncio.get_running_loop()
    try:
        while True:
            try:
                async with asyncio.timeout_at(min(due, loop.time() + QUIET_SECONDS)):
                    event = await listener.next()
            except TimeoutError:
                if loop.time() >= due:
                    raise late from None
                yield b": still at work\n\n"
                continue
            if isinstance(event, Failed):
                raise event.error
            yield await asyncio.to_thread(_event, event, wanted, kind, request_id)
            if isinstance(event, Done):
                return
    except ApiError as error:
        yield _packed("error", {"type": "error", "error": error.error})


def _event(event: Partial | Done, wanted: Wanted, kind: str, request_id: str) -> bytes:
    image = event.image if isinstance(event, Partial) else event.made[0].generation.image
    name = f"{kind}.{'partial_image' if isinstance(event, Partial) else 'completed'}"
    data: dict[str, Any] = {
        "type": name,
        "b64_json": encode(image, wanted.format, wanted.compression),
        "created_at": int(time.time()),
        "quality": "auto",
        **_about(image, wanted),
    }
    if isinstance(event, Partial):
        data["partial_image_index"] = event.index
    else:
        data |= {"usage": usage(event), "sparse_context": {"request_id": request_id, **report(event)}}
    return _packed(name, data)


def _packed(name: str, data: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()
