"""References that come again: their latents and scores are remembered, so that a call need not make them anew.

    cache = ReferenceCache()
    apply_sparse_context(pipe, keep=0.2, cache=cache)

Everything is addressed by content, so there is nothing to name and nothing to invalidate: what was remembered is found
again only for the same pixels, after the same preprocessing, in front of a VAE with the same weights and settings.
"""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch.utils.weak import WeakIdKeyDictionary, WeakIdRef

from .selection import score_tokens
from .selectors.cells import Grid
from .selectors.registry import SelectorLike, name_of

Remembered = TypeVar("Remembered", torch.Tensor, np.ndarray)


class ReferenceCache:
    """Latents and scores of the references that were used last, at most `max_bytes` of them.

    A reference of one megapixel takes 1 MiB as bfloat16 latents of FLUX.2, and 16 KiB for its scores. Latents stay on
    the device that they were made on. What was used longest ago goes first; what is larger than all of `max_bytes` is
    not kept. One cache may serve several pipelines, and several threads. `hits` and `misses` count look-ups.

    Weights are compared by torch's own version counters and addresses, and hashed again where those have changed. A
    write through `tensor.data` is hidden from them: call `clear` after one. Raises ValueError for `max_bytes` below 1.
    """

    def __init__(self, max_bytes: int = 256 * 2**20) -> None:
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 1:
            raise ValueError(f"max_bytes is {max_bytes!r}: pass a whole number of bytes, 1 or more.")
        self.max_bytes = max_bytes
        self.hits = self.misses = 0
        self._held: OrderedDict[bytes, torch.Tensor | np.ndarray] = OrderedDict()  # by the digest of what made it
        self._bytes = 0
        self._weights: weakref.WeakKeyDictionary[torch.nn.Module, tuple] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._held)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors and arrays that are held."""
        return self._bytes

    def clear(self) -> None:
        """Forget everything, the hashes of weights too."""
        with self._lock:
            self._held.clear()
            self._weights.clear()
            self._bytes = 0

    def encode(
        self,
        content: torch.Tensor | Sequence[np.ndarray],
        image: torch.Tensor,
        vae: torch.nn.Module,
        encode: Callable[[], torch.Tensor],
    ) -> torch.Tensor:
        """`encode()`, or a copy of what it gave for the same content before.

        `content` is the preprocessed picture, best on the CPU, where it is hashed: pixels (B, C, H, W), or uint8
        (H, W, 3) for each item of a batch, whose values are scaled to [-1, 1] and nothing else. `image` is what the VAE
        gets of it; of this, only device and dtype are looked at. A result that needs a gradient is not remembered, nor
        one of a VAE whose weights are elsewhere until it runs, as accelerate's sequential offloading has it.
        """
        about = (
            _function_name(encode),
            type(vae).__qualname__,
            _settings(vae),
            image.dtype,
            image.device,
            torch.is_autocast_enabled(image.device.type),
            torch.get_autocast_dtype(image.device.type),
            torch.is_inference_mode_enabled(),
        )
        weights = self._digest_of_weights(vae)
        if weights is None:
            return encode()
        key = _digest(about, weights, *([content] if isinstance(content, torch.Tensor) else content))
        latents = self._find(key, torch.Tensor)
        if latents is None:
            latents = encode()
            if not latents.requires_grad:
                self._hold(key, latents.clone())
            return latents
        return latents.clone()

    def score(self, selector: SelectorLike, image: np.ndarray | None, grid: Grid, seed: Sequence[int]) -> np.ndarray:
        """`selection.score_tokens`, or a copy of what it gave before. A function of the user's own runs every time."""
        name = name_of(selector)
        if name is None:
            return score_tokens(selector, image, grid, seed)
        key = _digest((name, grid, tuple(seed)), b"", image)
        scores = self._find(key, np.ndarray)
        if scores is None:
            scores = score_tokens(selector, image, grid, seed)
            self._hold(key, scores.copy())
            return scores
        return scores.copy()

    def _find(self, key: bytes, kind: type[Remembered]) -> Remembered | None:
        with self._lock:
            found = self._held.get(key)
            if not isinstance(found, kind):  # a key says what was made, so it is of this kind or not there
                self.misses += 1
                return None
            self.hits += 1
            self._held.move_to_end(key)
            return found

    def _hold(self, key: bytes, value: torch.Tensor | np.ndarray) -> None:
        with self._lock:
            if value.nbytes > self.max_bytes or key in self._held:  # another thread may have been quicker
                return
            while self._bytes + value.nbytes > self.max_bytes:  # room first, so that the bound holds at every moment
                self._bytes -= self._held.popitem(last=False)[1].nbytes
            self._held[key] = value
            self._bytes += value.nbytes

    def _digest_of_weights(self, module: torch.nn.Module) -> bytes | None:
        """Of every parameter and buffer; hashed anew only where torch says that one has changed or moved. None where
        one is not there to be hashed."""
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        if any(tensor.is_meta for tensor in tensors.values()):
            return None
        state = [_state_of(tensor) for tensor in tensors.values()]
        with self._lock:
            last_state, digest = self._weights.get(module, (None, b""))
        if last_state != state or None in state:
            digest = _digest(tuple(tensors), b"", *tensors.values())
            with self._lock:
                self._weights[module] = state, digest
        return digest


def _state_of(tensor: torch.Tensor) -> tuple | None:
    """Equal to what it was as long as nothing was written; None where torch keeps no record of that."""
    if tensor.is_inference():
        return None
    return WeakIdRef(tensor), tensor._version, tensor.data_ptr(), tensor.dtype, tensor.device


_fixed = WeakIdKeyDictionary()  # arrays that nobody writes to -> their digests, None until they are asked for
_fixing = threading.Lock()


def fix(array: np.ndarray) -> np.ndarray:
    """`array`, which nobody is going to write to: it is hashed once, however often it is looked up. Raises ValueError
    for one that can be written to."""
    if array.flags.writeable:
        raise ValueError("The array can be written to: set its flags.writeable to False first.")
    with _fixing:
        _fixed[array] = None
    return array


def _settings(vae: torch.nn.Module) -> str:
    """A VAE's config, which may be any object where it is the user's own, and its switches such as tiling."""
    switches = {k: v for k, v in vars(vae).items() if isinstance(v, (bool, int, float, str, tuple))}
    config = vae.config if isinstance(vae.config, Mapping) else vars(vae.config)
    return repr((sorted(config.items(), key=lambda item: item[0]), sorted(switches.items())))


def _function_name(function: Callable) -> str:
    """Of a callable, or of the function that a `partial` binds."""
    function = getattr(function, "func", function)
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', repr(function))}"


def _digest(about: tuple, digest: bytes, *contents: torch.Tensor | np.ndarray | None) -> bytes:
    """SHA-256, which processors have instructions for, of a description, another digest and whole arrays."""
    sha = hashlib.sha256(repr(about).encode() + digest)
    for content in contents:
        if content is not None:
            sha.update(_digest_of(content))
    return sha.digest()


def _digest_of(content: torch.Tensor | np.ndarray) -> bytes:
    """Of one array, with its shape, strides and type."""
    with _fixing:
        known = _fixed.get(content)
        is_fixed = content in _fixed
    if known is not None:
        return known
    strides = content.stride() if isinstance(content, torch.Tensor) else content.strides
    sha = hashlib.sha256(repr((tuple(content.shape), strides, content.dtype)).encode())
    if isinstance(content, torch.Tensor):  # numpy has no bfloat16
        sha.update(content.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    else:
        sha.update(np.ascontiguousarray(content).data)
    if is_fixed:
        with _fixing:
            _fixed[content] = sha.digest()
    return sha.digest()
