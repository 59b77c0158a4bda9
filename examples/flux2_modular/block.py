"""Sparse Context for modular FLUX.2, as `diffusers-cli custom_blocks` packages it. Needs sparse-context."""

from diffusers import ModularPipelineBlocks

from sparse_context.families import flux2_modular


class SparseContextStep(flux2_modular.SparseContextStep, ModularPipelineBlocks):
    """Insert behind `prepare_image_latents`; then a call takes `keep`, `selector`, `task`, `coverage` and `merge`."""
