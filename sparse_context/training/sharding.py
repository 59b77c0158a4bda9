"""FSDP2: each process holds a part of every weight of the transformer, and gathers a block's while that is computed.

torch's own `fully_shard` on all processes, on GPUs as on CPUs; accelerate's config says that it is wanted, and starts
the processes. It needs every process in every forward, backward and `whole`: one that stays away leaves the others
waiting.
"""

import os
from typing import Any, cast

import torch
from torch import nn


def is_asked_for(accelerator: Any) -> bool:
    """Whether accelerate's config asks for FSDP. Raises ValueError for what of it is not done here."""
    from accelerate.utils import FullyShardedDataParallelPlugin, parse_flag_from_env

    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None and parse_flag_from_env("ACCELERATE_USE_FSDP"):  # which it passes over on CPUs
        plugin = FullyShardedDataParallelPlugin()
    if plugin is None:
        return False
    from torch.distributed.fsdp import CPUOffloadPolicy

    refused = {
        f"fsdp_version is {plugin.fsdp_version}": (plugin.fsdp_version != 2, "set it to 2"),
        "fsdp_activation_checkpointing is true": (
            plugin.activation_checkpointing,
            "leave it out, and pass gradient_checkpointing=true here",
        ),
        "fsdp_offload_params is true": (isinstance(plugin.cpu_offload, CPUOffloadPolicy), "leave it out"),
        "fsdp_reshard_after_forward is false": (plugin.reshard_after_forward is False, "leave it out"),
    }
    for what, (is_so, advice) in refused.items():
        if is_so:
            raise ValueError(f"{what} in accelerate's config, which is not for runs here: {advice}.")
    # With it transformers would give the text encoder its weights in one process alone, and wait for accelerate
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    return True


def block_classes(transformer: nn.Module) -> set[type[nn.Module]]:
    """The classes of the transformer's blocks: those that its model names, or else what its lists of modules hold."""
    names = set(getattr(transformer, "_no_split_modules", None) or ())
    named = {type(layer) for layer in transformer.modules() if type(layer).__name__ in names}
    lists = [child for child in transformer.children() if isinstance(child, nn.ModuleList)]
    return named or {type(block) for blocks in lists for block in blocks}


def shard(transformer: nn.Module, device: torch.device) -> None:
    """Leave this process its part of the transformer's weights, on `device`; a block at a time is moved there.

    Call it after an adapter is there and before an optimiser is: the weights are other tensors afterwards.
    """
    from torch.distributed import get_world_size
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (get_world_size(),))
    kinds = tuple(block_classes(transformer))
    # The outermost too is sharded again after its forward, which is not torch's default: what is left gathered by a
    # forward without a backward, such as that of a validation picture, would be computed with when the weights are
    # others again
    for layer in [*(layer for layer in transformer.modules() if isinstance(layer, kinds)), transformer]:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)


def is_sharded(module: nn.Module) -> bool:
    """Whether the weights of `module` are parts."""
    return any(is_part(parameter) for parameter in module.parameters())


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before `shard` put one of its own and `FSDPModule` in front of it."""
    first, second, *others = type(module).__mro__
    return others[0] if second.__name__ == "FSDPModule" else first


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of all processes' parts, which all of them ask for; one that is whole is returned itself."""
    return cast(Any, tensor).full_tensor() if is_part(tensor) else tensor


def part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor, sharing its memory; one that is whole is returned itself."""
    return cast(Any, tensor).to_local() if is_part(tensor) else tensor


def parted_as(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A tensor that all processes have, as `like` of the same shape is parted; itself where that is whole."""
    if not is_part(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    sharded = cast(Any, like)
    on_device = tensor.to(sharded.to_local().device)
    return distribute_tensor(on_device, sharded.device_mesh, sharded.placements, src_data_rank=None)


def part_of(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor, as a part of one that is parted as `like`; itself where that is whole."""
    if not is_part(like):
        return tensor
    from torch.distributed.tensor import DTensor

    sharded = cast(Any, like)
    return DTensor.from_local(
        tensor, sharded.device_mesh, sharded.placements, shape=sharded.shape, stride=sharded.stride()
    )


def is_part(tensor: torch.Tensor) -> bool:
    """Whether other processes hold the rest of a tensor."""
    if type(tensor) in (torch.Tensor, nn.Parameter):  # a process alone imports nothing for it
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def unsharded(transformer: Any, keep: bool) -> Any:
    """A copy of the transformer on the CPU, whole and of its own class; without `keep`, None. All processes call it."""
    tensors = {}
    for name, tensor in transformer.state_dict().items():
        gathered = whole(tensor)
        if keep:
            tensors[name] = gathered.cpu()
    if not keep:
        return None
    kind: Any = plain_class(transformer)
    with torch.device("meta"):
        copy = kind.from_config(transformer.config)
    copy.load_state_dict(tensors, assign=True)
    return copy
