"""The processes that share a run: one, or those of an `accelerate.Accelerator`."""

from typing import Any

import torch
from torch import nn


class Processes:
    """What processes do together; with one, nothing is exchanged.

    main: whether this is the one that writes. rank: its number, of `count`.
    """

    def __init__(self, accelerator: Any = None) -> None:
        """accelerator: an `accelerate.Accelerator`, or None for one plain process."""
        self._accelerator = accelerator
        self.main: bool = accelerator is None or accelerator.is_main_process
        self.count: int = 1 if accelerator is None else accelerator.num_processes
        self.rank: int = 0 if accelerator is None else accelerator.process_index

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
        """Give the parameters of `module` the mean of their gradients in all processes."""
        if self.count == 1:
            return
        for parameter in module.parameters():
            if parameter.requires_grad:
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.mean(gradient)

    @torch.no_grad()
    def agree_on_start(self, module: nn.Module, average: nn.Module, first: int) -> None:
        """Give all processes the weights of the first. Raises OSError where they found different checkpoints."""
        if self.count == 1:
            return
        from accelerate.utils import broadcast

        steps = self._accelerator.gather(torch.tensor([first], device=self._accelerator.device)).tolist()
        if len(set(steps)) > 1:
            raise OSError(
                f"The processes found checkpoints of different steps ({', '.join(map(str, steps))}): they need a "
                "folder that all of them share."
            )
        for tensor in {id(t): t for m in (module, average) for t in m.state_dict().values()}.values():
            tensor.copy_(broadcast(tensor))
