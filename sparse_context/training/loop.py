"""The training loop: one function, resumable at any kill.

Everything random in a step is drawn from a generator seeded by (seed, step), so that a run that was killed and resumed
sees the same batches and ends at the same weights as one that was not; no generator state is stored. A checkpoint is a
folder of safetensors files (nothing is pickled) that is renamed into place when it is whole.

Output contract, in `folder`: `step-0001000/{weights,average,optimiser}.safetensors` (the last two are kept), and
`log.jsonl` with one record every `log_every` steps.
"""

import copy
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm


def learning_rate(step: int, steps: int, warmup: int) -> float:
    """The factor on the learning rate at `step`: up over `warmup` steps, flat, down to 0 over the last quarter."""
    return min(1.0, (step + 1) / warmup, (steps - step) / (steps / 4))


def make_optimisers(
    module: nn.Module, matrices: Sequence[str], lr: float, muon_lr: float
) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al., 2024) on the matrices inside the children named by `matrices`, AdamW on everything else."""
    inside = [
        p for n, p in module.named_parameters() if p.requires_grad and p.ndim == 2 and n.startswith(tuple(matrices))
    ]
    chosen = {id(p) for p in inside}
    rest = [p for p in module.parameters() if p.requires_grad and id(p) not in chosen]
    optimisers: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)]
    if inside:
        optimisers.append(torch.optim.Muon(inside, lr=muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
    return optimisers


def train(
    module: nn.Module,
    optimisers: Sequence[torch.optim.Optimizer],
    loss: Callable[[int], torch.Tensor],
    folder: Path,
    *,
    steps: int,
    warmup: int = 200,
    ema: float = 0.999,
    clip: float = 1.0,
    log_every: int = 20,
    save_every: int = 200,
    at_save: Callable[[int, nn.Module], None] | None = None,
    stop_after: float | None = None,
) -> nn.Module:
    """Minimise `loss(step)` over the parameters of `module` and return the averaged (EMA) copy.

    Continues from the newest checkpoint in `folder`, if there is one. `at_save(step, average)` runs beside every
    checkpoint, for sample sheets. `stop_after` is a number of seconds after which the run saves and returns early.
    """
    folder.mkdir(parents=True, exist_ok=True)
    average = copy.deepcopy(module).eval().requires_grad_(False)
    first = _resume(folder, module, average, optimisers)
    base_rates = [group["lr"] for o in optimisers for group in o.param_groups]
    started, window = time.monotonic(), []
    bar = tqdm(range(first, steps), initial=first, total=steps, desc=folder.name, unit="step", mininterval=5)
    for step in bar:
        factor = learning_rate(step, steps, warmup)
        for group, rate in zip((g for o in optimisers for g in o.param_groups), base_rates, strict=True):
            group["lr"] = rate * factor
        value = loss(step)
        value.backward()
        norm = nn.utils.clip_grad_norm_(module.parameters(), clip)
        if torch.isfinite(norm):
            for optimiser in optimisers:
                optimiser.step()
        module.zero_grad(set_to_none=True)
        _follow(average, module, min(ema, (step + 1) / (step + 10)))
        window.append(value.detach())
        if (step + 1) % log_every == 0:
            mean = torch.stack(window).mean().item()
            window.clear()
            bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
            record = {"step": step + 1, "loss": mean, "norm": norm.item(), "seconds": time.monotonic() - started}
            with (folder / "log.jsonl").open("a") as f:
                f.write(json.dumps(record) + "\n")
        out_of_time = stop_after is not None and time.monotonic() - started > stop_after
        if (step + 1) % save_every == 0 or step + 1 == steps or out_of_time:
            for group, rate in zip((g for o in optimisers for g in o.param_groups), base_rates, strict=True):
                group["lr"] = rate
            _save(folder, step + 1, module, average, optimisers)
            if at_save is not None:
                at_save(step + 1, average)
        if out_of_time:
            break
    return average


@torch.no_grad()
def _follow(average: nn.Module, module: nn.Module, decay: float) -> None:
    for kept, new in zip(average.parameters(), module.parameters(), strict=True):
        kept.lerp_(new, 1 - decay)
    for kept, new in zip(average.buffers(), module.buffers(), strict=True):
        kept.copy_(new)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-*") if p.suffix != ".partial")


def _save(folder: Path, step: int, module: nn.Module, average: nn.Module, optimisers) -> None:
    partial = folder / f"step-{step:07d}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    save_file(_own(module.state_dict()), partial / "weights.safetensors")
    save_file(_own(average.state_dict()), partial / "average.safetensors")
    state = {
        f"{i}.{index}.{name}": tensor
        for i, optimiser in enumerate(optimisers)
        for index, entry in optimiser.state_dict()["state"].items()
        for name, tensor in entry.items()
    }
    save_file(_own(state), partial / "optimiser.safetensors")
    for file in partial.iterdir():
        with file.open("rb") as f:
            os.fsync(f.fileno())
    whole = partial.with_suffix("")
    shutil.rmtree(whole, ignore_errors=True)
    partial.rename(whole)
    for old in _checkpoints(folder)[:-2]:
        shutil.rmtree(old)


def _own(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous copies: safetensors refuses tensors that share memory, as tied embeddings do."""
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


def _resume(folder: Path, module: nn.Module, average: nn.Module, optimisers) -> int:
    """Load the newest checkpoint and return the number of steps that it has seen (0 without one)."""
    checkpoints = _checkpoints(folder)
    if not checkpoints:
        return 0
    newest = checkpoints[-1]
    module.load_state_dict(load_file(newest / "weights.safetensors"))
    average.load_state_dict(load_file(newest / "average.safetensors"))
    flat = load_file(newest / "optimiser.safetensors")
    for i, optimiser in enumerate(optimisers):
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, tensor in flat.items():
            which, index, name = key.split(".", 2)
            if int(which) == i:
                state.setdefault(int(index), {})[name] = tensor
        optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    return int(newest.name.removeprefix("step-"))


def load_average(folder: Path, module: nn.Module) -> int:
    """Load the averaged weights of the newest checkpoint in `folder` into `module` and return its step."""
    checkpoints = _checkpoints(folder)
    if not checkpoints:
        raise FileNotFoundError(f"{folder} holds no checkpoint: run the step of the recipe that writes it first")
    module.load_state_dict(load_file(checkpoints[-1] / "average.safetensors"))
    return int(checkpoints[-1].name.removeprefix("step-"))
