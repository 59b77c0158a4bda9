"""What the operator of a server decides."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ..config import SparseContextConfig

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Settings:
    """Bounds, defaults and access of one server. Raises ValueError that names what is out of range.

    name: the model, as clients call it. config: what to keep where a client does not say; keep_high: the budget where
    it asks for input_fidelity "high". call: fields of `Request` where it says nothing, such as steps.
    api_key: what clients must present; None asks for none, which is for loopback alone.

    body: bytes of a request. references, pixels: how many pictures one may bring, and of how many pixels each. prompt:
    characters. pictures: the most that one request may ask for. output_pixels: of each. most_steps: of a call.
    queue: requests that may wait. uploads: requests whose bodies arrive or are looked at, at a time; upload_seconds:
    for each body. deadline: seconds from the end of the body to the answer. batch: pictures of a call at most; None: as
    many as a short trial at the start finds fastest. grace: seconds that a job goes on whose client is about to send it
    again.
    """

    name: str
    config: SparseContextConfig = field(default_factory=SparseContextConfig)
    keep_high: float | str = 0.5
    call: Mapping[str, Any] = field(default_factory=dict)
    api_key: str | None = None
    host: str = "127.0.0.1"
    body: int = 64 * 2**20
    references: int = 10
    pixels: int = 40_000_000
    prompt: int = 32_000
    pictures: int = 10
    output_pixels: int = 4 * 2**20
    most_steps: int = 100
    queue: int = 16
    uploads: int = 64
    upload_seconds: float = 60.0
    deadline: float = 300.0
    batch: int | None = None
    grace: float = 10.0

    def __post_init__(self) -> None:
        SparseContextConfig(keep=self.keep_high)
        for each in fields(self.config):
            value = getattr(self.config, each.name)
            if isinstance(value, (list, tuple)):
                raise ValueError(f"{each.name} is {value!r}: pass one value, for clients send any number of images.")
        for name in (
            "body", "references", "pixels", "prompt", "pictures", "output_pixels", "most_steps", "queue", "uploads"
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: pass 1 or more.")
        for name in ("upload_seconds", "deadline"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}: pass a number of seconds above 0.")
        if self.batch is not None and self.batch < 1:
            raise ValueError(f"batch is {self.batch}: pass 1 or more, or auto.")
        if self.api_key is not None and not self.api_key.isascii():
            raise ValueError("The API key has other characters than ASCII, which no header can carry: choose another.")
        if self.api_key is not None and len(self.api_key) < 16:
            raise ValueError(f"The API key has {len(self.api_key)} characters: choose one of 16 or more.")
        if self.host not in LOOPBACK and self.api_key is None:
            raise ValueError(
                f"host is {self.host!r}, which others can reach, and there is no API key: set SPARSE_CONTEXT_API_KEY, "
                "or name a file that holds one by --api-key-file."
            )
