"""The library that the nodes are built on, which need not be there: then a node says so, and the graph goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def library() -> Iterator[None]:
    """Within it, an import that fails for want of the library, or of a part of it, is an ImportError that says how to
    install it."""
    try:
        from sparse_context.layers import explain_missing_packages
    except ModuleNotFoundError as error:
        raise ImportError("The library of these nodes is not installed: pip install sparse-context.") from error
    with explain_missing_packages():
        yield
