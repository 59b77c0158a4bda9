"""Whether a device multiplies matrices in bfloat16 faster than in float32."""

import torch


def has_fast_bfloat16(device: torch.device | str) -> bool:
    """Whether `device` has instructions for bfloat16, as PyTorch's CPU kernels see it; True for accelerators.

    A CPU without them (x86 without AVX-512) falls back to loops: a product of two matrices of 1,024 rows takes a
    hundred times as long as in float32.
    """
    return torch.device(device).type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
