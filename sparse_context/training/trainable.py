"""What is trained: a LoRA, or all weights."""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..families.host import Host
from .config import TrainConfig
from .frozen import unpack_in_backward
from .optimisers import drawn_from, make_adamw, make_optimisers
from .sharding import shard

ADAPTER = "default"  # peft's own name of one


class Trainable(nn.Module):
    """The weights of a module that are trained, and only those: the same `Parameter`s under their own names.

    So checkpoints, the average and what processes exchange hold an adapter of megabytes and not its base of gigabytes.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                self.register_parameter(name.replace(".", "/"), parameter)


def prepare(host: Host, config: TrainConfig, shard_on: torch.device | None = None) -> Trainable:
    """Put a fresh LoRA on the transformer, or open all its weights; what is trained is float32.

    shard_on: the device on which this process is to hold its part of the weights; None: all of them stay where they
    are. Raises ValueError for layers that the transformer does not have, for a rank above the widest of them, and for
    heads that cannot be taught.
    """
    if config.teach_heads:
        host.check_heads(config.heads)
    transformer: Any = host.transformer
    transformer.requires_grad_(False)
    if config.full:
        transformer.float().requires_grad_(True)
    else:
        from peft import LoraConfig

        targets = list(config.lora_layers) if config.lora_layers else host.lora_targets()
        _check_rank(transformer, targets, config.rank)
        lora = LoraConfig(
            r=config.rank, lora_alpha=config.lora_alpha, init_lora_weights="gaussian", target_modules=targets
        )
        try:
            for name in targets:  # those that peft finds nowhere it passes over, as long as it finds others
                if not name or not any(f".{layer}".endswith(f".{name}") for layer, _ in transformer.named_modules()):
                    raise ValueError(f"it has no {name!r}")
            with drawn_from(config.seed):
                transformer.add_adapter(lora, ADAPTER)
        except ValueError as error:
            raise ValueError(
                f"lora_layers is {', '.join(targets)}, and the transformer takes no LoRA there "
                f"({' '.join(str(error).split())[:200].rstrip('.')}): name its linear layers, such as to_q,to_k,to_v."
            ) from error
        for parameter in transformer.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    unpack_in_backward(transformer)
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    transformer.train()
    if shard_on is not None:
        shard(transformer, shard_on)
    return Trainable(transformer)


def _check_rank(transformer: nn.Module, targets: Sequence[str], rank: int) -> None:
    """A rank above the widest layer's own adds memory alone, up to all there is."""
    widest = max(
        (
            min(layer.in_features, layer.out_features)
            for name, layer in transformer.named_modules()
            if isinstance(layer, nn.Linear) and any(f".{name}".endswith(f".{target}") for target in targets)
        ),
        default=rank,
    )
    if rank > widest:
        raise ValueError(f"rank is {rank}, and no layer that gets a LoRA has a rank above {widest}: pass at most that.")


def run_optimisers(transformer: nn.Module, trained: Trainable, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW on what is trained, of 8 bits if so asked; with Muon, that on the matrices of the transformer's blocks and
    AdamW on the rest."""
    decay = config.adam_weight_decay
    if config.muon_learning_rate is None:
        return [make_adamw(trained.parameters(), config.learning_rate, decay, config.use_8bit_adam)]
    blocks = [f"{name}/" for name, child in transformer.named_children() if isinstance(child, nn.ModuleList)]
    return make_optimisers(
        trained, blocks, config.learning_rate, config.muon_learning_rate, decay, config.use_8bit_adam
    )


@contextlib.contextmanager
def weights_of(average: nn.Module, trained: nn.Module) -> Iterator[None]:
    """The averaged weights in the place of the trained ones."""
    if average is trained:
        yield
        return
    last = copy.deepcopy(trained.state_dict())
    trained.load_state_dict(average.state_dict())
    try:
        yield
    finally:
        trained.load_state_dict(last)
