"""Owns PackedLayout: everything that decides which tensors one quantized linear or embedding consists of."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from qtipcli.errors import QtipError
from qtipcli.quant.transform import Transform, padded
from qtipcli_kernels import codes, packing
from qtipcli_kernels.spec import WORD_BITS, TrellisSpec

SCALE_BITS = 16
"""Scales and tables are fp16."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor on disk. `dtypes` are the names that safetensors gives them; the first is the one to write."""

    dtypes: tuple[str, ...]
    shape: tuple[int, ...]


ANY_FLOAT = ("BF16", "F16", "F32")


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """One matrix's sizes and codes, validated once.

    in_features, out_features: of the linear as the model sees it, any positive integers.
    spec: trellis and code.
    transform_in, transform_out: the incoherence transform of each side.
    bias: whether it has one.
    embedding: whether it is a token embedding: a row of out_features for each token, in_features values each.
    """

    in_features: int
    out_features: int
    spec: TrellisSpec
    transform_in: Transform = field(default_factory=Transform)
    transform_out: Transform = field(default_factory=Transform)
    bias: bool = False
    embedding: bool = False

    def __post_init__(self) -> None:
        if self.in_features < 1 or self.out_features < 1:
            raise QtipError(f"a linear of {self.out_features} x {self.in_features}", "both sizes must be positive")
        if self.embedding and self.bias:
            raise QtipError("an embedding with a bias", "only linears have one")

    @property
    def padded_in(self) -> int:
        """Input features, padded to whole tiles."""
        return padded(self.in_features)

    @property
    def padded_out(self) -> int:
        """Output features, padded to whole tiles."""
        return padded(self.out_features)

    @property
    def block_in(self) -> int:
        """Values that the input side's transform spans."""
        return self.transform_in.block_of(self.in_features)

    @property
    def block_out(self) -> int:
        """Values that the output side's transform spans."""
        return self.transform_out.block_of(self.out_features)

    @property
    def trellis_shape(self) -> tuple[int, int]:
        """[O/16, I/16 * W] of the padded matrix, W words a tile."""
        return packing.trellis_shape(self.padded_out, self.padded_in, self.spec)

    @property
    def lut_shape(self) -> tuple[int, int] | None:
        """Shape of the table stored with the layer, or None for a computed code."""
        return codes.lut_shape(self.spec)

    @property
    def weights(self) -> int:
        """Number of weights that the layer stands for, without padding."""
        return self.in_features * self.out_features

    @property
    def stored_bits(self) -> int:
        """Bits of trellis, scales and table: padding counted, the bias not, since it is no weight."""
        rows, words = self.trellis_shape
        table = math.prod(self.lut_shape) if self.lut_shape else 0
        return rows * words * WORD_BITS + (self.in_features + self.out_features + table) * SCALE_BITS

    def tensors(self) -> dict[str, StoredTensor]:
        """Every tensor of the layer by its name after the layer's, as docs/format.md lists them."""
        stored = {
            "trellis": StoredTensor(("I32",), self.trellis_shape),
            "scale_in": StoredTensor(("F16",), (self.in_features,)),
            "scale_out": StoredTensor(("F16",), (self.out_features,)),
            "weight": StoredTensor(ANY_FLOAT, (0,)),
        }
        if self.lut_shape:
            stored["lut"] = StoredTensor(("F16",), self.lut_shape)
        if self.bias:
            stored["bias"] = StoredTensor(ANY_FLOAT, (self.out_features,))
        return stored
