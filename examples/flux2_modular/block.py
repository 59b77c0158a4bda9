"""Sparse Context for modular FLUX.2, as `diffusers-cli custom_blocks` packages it. Needs sparse-context."""

from diffusers import ModularPipelineBlocks

from sparse_context.families.flux2 import modular


class SparseContextStep(modular.SparseContextStep, ModularPipelineBlocks):
    """Insert behind `prepare_image_latents`; then a call takes `keep`, `selector`, `task`, `coverage` and `merge`."""
