"""Owns Transform: which incoherence transform one side of a matrix uses, and over how many values at a time. No torch here.

Two are needed (QuIP#, arXiv 2402.04396, section 3; QTIP, arXiv 2406.11235, section 2): "full" spans the whole dimension and
mixes best; "block" leaves blocks independent, as tensor parallelism and fused kernels want it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from qtipcli.errors import QtipError
from qtipcli_kernels.spec import TILE

DEFAULT_BLOCK = 128
"""Values that one block of the "block" transform spans: EXL3's, and what a warp holds in registers."""

KINDS = ("full", "block")


def padded(dimension: int) -> int:
    """`dimension` rounded up to a whole number of tiles, a multiple of 16."""
    return -(-dimension // TILE) * TILE


@dataclass(frozen=True, slots=True)
class Transform:
    """The incoherence transform of one side of a matrix.

    kind: "full" or "block".
    block: values a block spans, a power of two from 16 on; without meaning, and 128, where kind is "full".
    """

    kind: str = "full"
    block: int = DEFAULT_BLOCK

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise QtipError(f"unknown incoherence transform {self.kind!r}", f"choose one of: {', '.join(KINDS)}")
        if self.block < TILE or self.block & (self.block - 1):
            raise QtipError(f"an incoherence transform of {self.block} values", f"choose a power of two, {TILE} or more")
        if self.kind == "full" and self.block != DEFAULT_BLOCK:
            raise QtipError(f"a full transform has no block of {self.block}", "leave the block out, or choose kind 'block'")

    @classmethod
    def parse(cls, text: str) -> Transform:
        """The inverse of `str`: "full" or "block-128". Raises QtipError naming the text."""
        if text == "full":
            return cls()
        match = re.fullmatch(r"block-([1-9][0-9]{0,8})", text) if isinstance(text, str) else None
        if match is None:
            raise QtipError(f"unknown incoherence transform {text!r}", "known are 'full' and 'block-N', such as 'block-128'")
        return cls("block", int(match[1]))

    def __str__(self) -> str:
        return "full" if self.kind == "full" else f"block-{self.block}"

    def block_of(self, dimension: int) -> int:
        """Values that the transform spans on a side of `dimension` values, which is padded to a multiple of 16 first.

        "full": the padded dimension. "block": the largest power of two that divides it, at most `block` (so 16 or more).
        """
        size = padded(dimension)
        if self.kind == "full":
            return size
        return min(size & -size, self.block)
