"""A progress bar around what may take long."""

from collections.abc import Iterable

from ..layers import explain_missing_packages


def progress(count: int, name: str, unit: str) -> Iterable[int]:
    """0 to `count` - 1, with a progress bar where it takes more than two seconds."""
    with explain_missing_packages():
        from tqdm import tqdm
    return tqdm(range(count), desc=name, unit=unit, delay=2)
