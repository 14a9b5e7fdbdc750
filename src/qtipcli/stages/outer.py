"""Owns which matrices outside the decoder blocks are rounded, and how: the head and the token embedding.

A head is rounded under the Hessian of its own input, H. An embedding is looked up, which is a product with unit vectors: its
Hessian is the identity, I. Where it is tied to the head, the one matrix is used in both ways, and its Hessian is the mean of
both, H / mean(diag H) + I: under H alone the error goes where the head does not see it and the look-up does (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qtipcli.config import LayerSettings, QuantizeSettings
from qtipcli.errors import QtipError, SettingsError
from qtipcli.job.directory import RunDirectory
from qtipcli.model.outer import find_embedding, find_head, is_tied
from qtipcli.model.skeleton import Skeleton
from qtipcli.nn.layout import PackedLayout
from qtipcli.quant.transform import Transform
from qtipcli.stages import calibrate
from qtipcli_kernels.spec import TILE, TrellisSpec

HEAD, EMBEDDING = "head", "embedding"
"""The shards of a quantize job that hold them; with "_bits" behind, the settings that ask for them."""

HEAD_OUTPUTS = Transform("block")
"""Transform of the head's output side, whatever the job's. A full one over a vocabulary whose odd part is large costs as much
as the product itself: 151,936 = 2^7 x 1187 takes a dense 1187 x 1187 factor, 180 M multiplications a token where the matrix
of a hidden size of 896 has 136 M weights. Blocks of 128 make the weights as even."""

EMBEDDING_ROWS = Transform("block", TILE)
"""Transform of an embedding's vocabulary side: a row that is looked up needs the rows of its block, and a tile has 16."""


@dataclass(frozen=True)
class OuterMatrix:
    """One matrix outside the blocks that is to be rounded.

    key: of its shard. name: of its module. shape: [O, I]. bias: whether its module has one.
    spec: its trellis. transform_out: of its output side. embedding: whether its rows are looked up.
    head: name of the head whose matrix this is; None for an embedding by itself.
    """

    key: str
    name: str
    shape: tuple[int, int]
    bias: bool
    spec: TrellisSpec
    transform_out: Transform
    embedding: bool
    head: str | None

    def hessian(self, calibration: RunDirectory) -> torch.Tensor:
        """Float32 [I, I], of the uses that the model makes of the matrix."""
        looked_up_II = torch.eye(self.shape[1])
        if self.head is None:
            return looked_up_II
        hessian_II = calibration.read(calibrate.HEAD)[self.head]
        size = float(hessian_II.diagonal().mean())
        return hessian_II / size + looked_up_II if self.embedding and size > 0 else hessian_II

    def bytes(self, transform_in: Transform) -> int:
        """Stored bytes of trellis, scales and table."""
        layout = PackedLayout(self.shape[1], self.shape[0], self.spec, transform_in, self.transform_out, self.bias)
        return layout.stored_bits // 8

    def stand_in(self) -> nn.Linear:
        """A linear of these sizes, on meta."""
        return nn.Linear(self.shape[1], self.shape[0], bias=self.bias, device="meta")

    def report(self) -> dict[str, Any]:
        """What the ledger keeps of it besides what it keeps of every layer."""
        return {"transform_out": str(self.transform_out), "embedding": self.embedding}

    def left(self) -> dict[str, str]:
        """Linears that are not packed because of it -> why."""
        return {} if self.head in (None, self.name) else {self.head: f"tied to {self.name}, which is packed"}


def plan(skeleton: Skeleton, settings: QuantizeSettings) -> dict[str, OuterMatrix]:
    """Name -> what `settings` ask for of this model. No weight is read.

    Raises SettingsError where the head is asked for and is the embedding, QtipError where a module cannot be packed.
    """
    found = []
    if settings.head_bits is not None:
        found.append(_head(skeleton, settings, settings.head_bits))
    if settings.embedding_bits is not None:
        found.append(_embedding(skeleton, settings, settings.embedding_bits))
    return {matrix.name: matrix for matrix in found}


def shard_keys(settings: Mapping[str, Any]) -> list[str]:
    """The shards, besides those of the blocks, that a finished job of these (frozen) settings holds."""
    return [key for key in (HEAD, EMBEDDING) if settings.get(f"{key}_bits") is not None]


def needs_head_hessian(matrices: Mapping[str, OuterMatrix]) -> bool:
    """Whether the calibrate stage must have seen the head's input."""
    return any(matrix.head is not None for matrix in matrices.values())


def _head(skeleton: Skeleton, settings: QuantizeSettings, bits: float) -> OuterMatrix:
    name, linear = find_head(skeleton)
    if is_tied(skeleton):
        remedy = f"say --embedding-bits {bits:g} instead, which packs it once for both"
        raise SettingsError(
            f"the head of {skeleton.source.name} is its token embedding: they are one matrix, which --head-bits cannot pack",
            remedy if settings.embedding_bits is None else "leave --head-bits out: --embedding-bits packs it once for both",
        )
    spec, shape = settings.spec(LayerSettings(bits=bits)), (linear.out_features, linear.in_features)
    return OuterMatrix(HEAD, name, shape, linear.bias is not None, spec, HEAD_OUTPUTS, embedding=False, head=name)


def _embedding(skeleton: Skeleton, settings: QuantizeSettings, bits: float) -> OuterMatrix:
    name, embedding = find_embedding(skeleton)
    spec, shape = settings.spec(LayerSettings(bits=bits)), (embedding.num_embeddings, embedding.embedding_dim)
    head = _tied_head(skeleton) if is_tied(skeleton) else None
    return OuterMatrix(EMBEDDING, name, shape, False, spec, EMBEDDING_ROWS, embedding=True, head=head)


def _tied_head(skeleton: Skeleton) -> str:
    name, linear = find_head(skeleton)
    if linear.bias is not None:
        raise QtipError(
            f"the head of {skeleton.source.name}, {name}, is tied to the token embedding and has a bias",
            "leave it as it is: leave --embedding-bits out",
        )
    return name
