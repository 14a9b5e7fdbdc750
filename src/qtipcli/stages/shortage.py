"""Owns what is said where memory runs out while a layer is rounded: which layer, what it takes, and what helps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from qtipcli.errors import QtipError, is_out_of_memory


@contextlib.contextmanager
def explained(layer: Callable[[], str], takes: Callable[[], int]) -> Iterator[None]:
    """Inside, memory that runs out is a QtipError. layer: what is worked on. takes: bytes that it takes; either may fail."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        try:
            needed = f": rounding it takes about {takes() / 1e6:,.0f} MB beside its block"
        except (MemoryError, RuntimeError):
            needed = ""
        raise QtipError(
            f"memory ran out at {layer()}{needed}",
            "free memory, or take a machine with more, and give the same command again: finished blocks are kept",
        ) from error
