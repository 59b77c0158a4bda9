"""Muon that takes all matrices of one shape at once."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from .precision import has_fast_bfloat16
from .sharding import is_part, part, part_of, parted_as, whole

MOST = 2**26  # values of sharded matrices that are gathered at once


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` (Jordan et al., 2024), with its settings and its state, on float32 matrices.

    torch takes one matrix after the other, and small ones keep a GPU waiting for launches: in one profile of the
    embedded model's training on an H200, 26 of the 107 ms of a step. torch orthogonalises in bfloat16; so does
    this where the device has instructions for it. The updates differ by that rounding.

    Of sharded matrices (sharding.py) each process remembers its part of the momentum, and all of them gather a few
    matrices at a time and orthogonalise them alike.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what `closure` does, which computes the gradients anew."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            shapes: dict[torch.Size, list[torch.Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes[parameter.shape].append(parameter)
            for (rows, columns), same in shapes.items():
                few = max(1, MOST // (rows * columns)) if is_part(same[0]) else len(same)
                for first in range(0, len(same), few):
                    self._update(same[first : first + few], group, _ratio(group["adjust_lr_fn"], rows, columns))
        return loss

    def _update(self, matrices: list[torch.Tensor], group: dict[str, Any], ratio: float) -> None:
        """A step of matrices of one shape, with the learning rate times `ratio`."""
        gradients = [part(matrix.grad) for matrix in matrices if matrix.grad is not None]
        momenta = [part(self._momentum(matrix)) for matrix in matrices]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        updates = torch._foreach_lerp(gradients, momenta, group["momentum"]) if group["nesterov"] else momenta
        stacked = torch.stack([whole(part_of(u, matrix)) for u, matrix in zip(updates, matrices, strict=True)])
        whitened = orthogonal(stacked, group["ns_coefficients"], group["ns_steps"], group["eps"])
        held = [part(matrix) for matrix in matrices]
        torch._foreach_mul_(held, 1 - group["lr"] * group["weight_decay"])
        steps = [part(parted_as(w, matrix)) for w, matrix in zip(whitened.to(held[0].dtype), matrices, strict=True)]
        torch._foreach_add_(held, steps, alpha=-group["lr"] * ratio)

    def _momentum(self, matrix: torch.Tensor) -> torch.Tensor:
        state = self.state[matrix]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        return state["momentum_buffer"]


def _ratio(adjust: str | None, rows: int, columns: int) -> float:
    """What torch multiplies the learning rate by for a matrix of this shape."""
    if adjust == "match_rms_adamw":
        return 0.2 * max(rows, columns) ** 0.5
    return max(1.0, rows / columns) ** 0.5


def orthogonal(
    matrices: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> torch.Tensor:
    """Matrices (N, rows, columns) with their singular values moved near 1 by the quintic Newton-Schulz iteration, in
    bfloat16 where the device has instructions for it, else in float32."""
    a, b, c = coefficients
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.to(torch.bfloat16 if has_fast_bfloat16(matrices.device) else torch.float32)
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
