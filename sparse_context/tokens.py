"""Reference tokens: the latents and the position ids of references, which are cut together or not at all.

A wrong position id runs silently (a transformer takes any), so `ReferenceTokens.keep` is the one place in the package
where a token is dropped, or averaged into one that is kept: one index, applied to both tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, eq=False)
class ReferenceTokens:
    """The tokens of all references of a call, one after another.

    `latents` is (B, N, C). `ids`, the position ids, is (B, N, A) or (N, A), as the host has it. N is the same in both.
    """

    latents: torch.Tensor
    ids: torch.Tensor

    def __post_init__(self) -> None:
        latents, ids = tuple(self.latents.shape), tuple(self.ids.shape)
        if len(latents) != 3 or len(ids) not in (2, 3) or latents[1] != ids[-2]:
            raise ValueError(
                f"Reference latents of shape {latents} and position ids of shape {ids} do not belong together: "
                "pass latents (B, N, C) and ids (B, N, A) or (N, A) with the same N."
            )

    def __len__(self) -> int:
        """N, the number of tokens of one batch item."""
        return self.latents.shape[1]

    def keep(self, index: np.ndarray | torch.Tensor, into: np.ndarray | None = None) -> ReferenceTokens:
        """Keep the tokens at `index`, in their order, and drop the others.

        With `into`, int64 (N,), a kept token becomes the mean of all that name it there, itself among them, at its own
        place; a token that names -1 is in no mean.

        `index` is 1-D int64 on the CPU (numpy or torch), strictly increasing, within [0, N), and shared by the batch:
        FLUX transformers read the position ids of the first batch item for all. It is checked on the CPU and then
        moved, so that dropping never waits for an accelerator. Gradients reach the kept latents. Raises ValueError.
        """
        if isinstance(index, torch.Tensor) and index.device.type != "cpu":
            raise ValueError(f"The index of kept tokens is on {index.device}: pass it on the CPU, where it is checked.")
        index = np.asarray(index)
        if index.ndim != 1 or index.dtype != np.int64:
            raise ValueError(
                f"The index of kept tokens has shape {index.shape} and type {index.dtype}: pass a 1-D int64 array, "
                "such as np.flatnonzero(mask)."
            )
        if len(index) and not (index[0] >= 0 and index[-1] < len(self)):
            outside = index[0] if index[0] < 0 else index[-1]
            raise ValueError(f"The index of kept tokens holds {outside}, but the tokens are 0 to {len(self) - 1}.")
        falls = np.flatnonzero(np.diff(index) <= 0)
        if len(falls):
            before, after = index[falls[0]], index[falls[0] + 1]
            raise ValueError(
                f"The index of kept tokens has {after} after {before}: sort it and name each token once, "
                "for example with np.unique."
            )
        if into is not None:
            self._check_into(index, into)
        if len(index) == len(self):
            return self  # strictly increasing and as long as the tokens: it names them all
        latents = self.latents.index_select(1, _to(self.latents, index))
        if into is not None:
            averages = np.flatnonzero(np.bincount(into[into >= 0], minlength=len(self))[index] > 1)
            if len(averages):
                latents = latents.index_copy(1, _to(self.latents, averages), self._means(index[averages], into))
        ids = self.ids.index_select(-2, _to(self.ids, index))
        return ReferenceTokens(latents, ids)

    def join(self, others: ReferenceTokens) -> ReferenceTokens:
        """These tokens and then `others`, such as those of overviews. Where their position ids are of two types, they
        are of the wider one: whole numbers and float32 are float32, so that fractions stay."""
        return ReferenceTokens(
            torch.cat([self.latents, others.latents], dim=1),
            torch.cat([self.ids, others.ids], dim=-2),
        )

    def _check_into(self, index: np.ndarray, into: np.ndarray) -> None:
        if into.shape != (len(self),) or into.dtype != np.int64:
            raise ValueError(
                f"The tokens to average into have shape {into.shape} and type {into.dtype}: pass int64 ({len(self)},)."
            )
        named = np.unique(into[into != -1])
        if not np.array_equal(named, index) or not np.array_equal(into[index], index):
            raise ValueError(
                "The tokens to average into are not the kept ones, each of which names itself: pass "
                "index=np.unique(into[into >= 0])."
            )

    def _means(self, tokens: np.ndarray, into: np.ndarray) -> torch.Tensor:
        """Latents (B, len(tokens), C): of each of `tokens` the mean over all that name it in `into`.

        By a table of members, which adds in the same order every time: a sum by index does not, on an accelerator.
        """
        members = np.flatnonzero(np.isin(into, tokens))
        members = members[np.argsort(into[members], kind="stable")]  # those of one mean side by side
        counts = np.bincount(np.searchsorted(tokens, into[members]), minlength=len(tokens))
        real = np.arange(counts.max()) < counts[:, None]
        table = np.zeros(real.shape, np.int64)
        table[real] = members
        values = self.latents.index_select(1, _to(self.latents, table.ravel())).float()
        values = values.unflatten(1, table.shape) * _to(self.latents, real)[..., None]
        return (values.sum(2) / _to(self.latents, counts)[:, None]).to(self.latents.dtype)


def _to(tensor: torch.Tensor, array: np.ndarray) -> torch.Tensor:
    """`array` where `tensor` is. A plain copy would wait for all that is queued there, the text encoder for one."""
    return torch.tensor(array).to(tensor.device, non_blocking=True)
