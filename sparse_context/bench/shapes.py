"""The shapes of all families, by the names of `bench --random-weights`. Nothing here imports torch."""

from collections.abc import Mapping

from ..families import bench_modules
from ..families.shape import Shape

SHAPES: Mapping[str, Shape] = {name: shape for module in bench_modules() for name, shape in module.SHAPES.items()}


def find_shape(name: str) -> Shape:
    """The shape called `name`. Raises ValueError that names all."""
    if name not in SHAPES:
        raise ValueError(f"random_weights is {name!r}: choose {', '.join(SHAPES)}.")
    return SHAPES[name]
