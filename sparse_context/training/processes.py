"""The processes that share a run: one, or those of an `accelerate.Accelerator`.

Batches and all that is drawn for them go by their number over all processes (`number`), so that as many batches a step
give the same run on one process and on several.
"""

from typing import Any

import torch
from torch import nn


class Processes:
    """What processes do together; with one, nothing is exchanged.

    main: whether this is the one that writes. rank: its number, of `count`. sharded: whether each holds a part of the
    weights (sharding.py), so that all take part wherever the transformer runs.
    """

    def __init__(self, accelerator: Any = None, fsdp: bool = False) -> None:
        """accelerator: an `accelerate.Accelerator`, or None for one plain process. fsdp: whether several share the
        weights."""
        self._accelerator = accelerator
        self.main: bool = accelerator is None or accelerator.is_main_process
        self.count: int = 1 if accelerator is None else accelerator.num_processes
        self.rank: int = 0 if accelerator is None else accelerator.process_index
        self.sharded: bool = fsdp and self.count > 1

    def number(self, batch: int) -> int:
        """The number, over all processes, of the batch that is this one's number `batch`."""
        return batch * self.count + self.rank

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """The mean of a tensor over all processes."""
        return self._accelerator.reduce(tensor, "mean") if self.count > 1 else tensor

    def mean_of(self, number: float) -> float:
        """The mean of a number over all processes."""
        return self.mean(torch.tensor(number, device=self._accelerator.device)).item() if self.count > 1 else number

    def any(self, flag: bool) -> bool:
        """Whether it is so in one of the processes."""
        if self.count == 1:
            return flag
        flags = torch.tensor(float(flag), device=self._accelerator.device)
        return bool(self._accelerator.reduce(flags, "sum") > 0)

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.count > 1:
            self._accelerator.wait_for_everyone()

    def average_gradients(self, module: nn.Module) -> None:
        """Give the parameters of `module` the mean of their gradients in all processes, unless the backward pass of
        sharded ones has done so."""
        if self.count == 1 or self.sharded:
            return
        for parameter in module.parameters():
            if parameter.requires_grad:
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.mean(gradient)

    def agree_on_base(self, weights: str) -> None:
        """Raise OSError where the processes loaded different models, told by 16 hex digits each (`cache.fingerprint`).

        Sharded, each would hold a part of another one.
        """
        if self.count > 1 and len(set(self._gather(int(weights[:15], 16)))) > 1:
            raise OSError("The processes loaded different models: give all of them the same files.")

    def _gather(self, number: int) -> list[int]:
        return self._accelerator.gather(torch.tensor([number], device=self._accelerator.device)).tolist()

    @torch.no_grad()
    def agree_on_start(self, module: nn.Module, average: nn.Module, first: int) -> None:
        """Give all processes the weights of the first; of sharded ones each has its own part already. Raises OSError
        where they found different checkpoints."""
        if self.count == 1:
            return
        from accelerate.utils import broadcast

        steps = self._gather(first)
        if len(set(steps)) > 1:
            raise OSError(
                f"The processes found checkpoints of different steps ({', '.join(map(str, steps))}): they need a "
                "folder that all of them share."
            )
        if self.sharded:
            return
        for tensor in {id(t): t for m in (module, average) for t in m.state_dict().values()}.values():
            tensor.copy_(broadcast(tensor))
