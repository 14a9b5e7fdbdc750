"""Owns the packed token embedding: rows looked up by decoding only the tiles they lie in, and the head that is tied to it.

Dimension key: N tokens, I values of a row, O rows (the vocabulary).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from qtipcli.errors import QtipError
from qtipcli.nn.layout import PackedLayout
from qtipcli.nn.linear import packed_linear
from qtipcli.nn.module import PackedModule
from qtipcli_kernels import dispatch
from qtipcli_kernels.spec import TILE


class TrellisEmbedding(PackedModule):
    """Row `id` of A = diag(scale_out) (H_out^T W~ H_in)[:O, :I] diag(scale_in) for each id; what docs/format.md calls dense.

    H_out mixes rows within its blocks only, so that a row needs the tiles of its own block: with transform_out block-16 one
    row of tiles. Nothing is kept between calls.

    Args and parameters: those of PackedModule. padding_idx: kept for the nn.Embedding that `dequantize` makes; changes nothing.
    """

    def __init__(
        self,
        layout: PackedLayout,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        padding_idx: int | None = None,
    ) -> None:
        super().__init__(layout, device, dtype)
        self.num_embeddings, self.embedding_dim, self.padding_idx = layout.out_features, layout.in_features, padding_idx

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: integers [...]. Returns [..., I] in the dtype of `weight`, the rows of `weight_dense`. Differentiable in scales.

        Raises IndexError, as nn.Embedding, for an id outside of the vocabulary.
        """
        # First, since it checks the ids: the padding has rows too.
        scale = functional.embedding(ids, self.scale_out[:, None]).to(torch.float32)
        rows = self._unscaled(ids.reshape(-1)).reshape(*ids.shape, self.in_features)
        return (scale * rows * self.scale_in.to(torch.float32)).to(self.weight.dtype)

    @torch.no_grad()
    def _unscaled(self, id_N: torch.Tensor) -> torch.Tensor:
        """Rows of (H_out^T W~ H_in)[:O, :I], float32 [N, I]; at most dispatch.STRIP_WEIGHTS weights are decoded at once."""
        block = self.layout.block_out
        at_once = max(1, dispatch.STRIP_WEIGHTS // (block * self.layout.padded_in))
        if len(id_N) == 1 or _is_recorded(id_N):
            parts = [self._decode(part // block, self._places(part)) for part in id_N.split(at_once)]
            return torch.cat(parts)
        block_U, place_N = torch.unique(id_N // block, return_inverse=True)
        row_NI = self.scale_in.new_empty(len(id_N), self.in_features, dtype=torch.float32)
        for start in range(0, len(block_U), at_once):
            inside = (place_N >= start) & (place_N < start + at_once)
            places = (place_N[inside] - start) * block + id_N[inside] % block
            row_NI[inside] = self._decode(block_U[start : start + at_once], places)
        return row_NI

    def _places(self, id_N: torch.Tensor) -> torch.Tensor:
        """Where the ids lie if the block of each is decoded for itself, one below the other."""
        block = self.layout.block_out
        return torch.arange(len(id_N), device=id_N.device) * block + id_N % block

    def _decode(self, block_U: torch.Tensor, place_N: torch.Tensor) -> torch.Tensor:
        """Rows `place_N`, float32 [N, I], of these blocks of rows, decoded and turned back."""
        layout = self.layout
        words = self.trellis.shape[1]
        chosen = self.trellis.reshape(-1, layout.block_out // TILE, words)[block_U].reshape(-1, words)
        decoded = dispatch.decode(chosen, layout.spec, self.lut)
        rows = dispatch.hadamard(decoded, layout.block_in, transpose=True)[:, : layout.in_features]
        return dispatch.hadamard(rows.T.contiguous(), layout.block_out, transpose=True).T[place_N]


def _is_recorded(tensor: torch.Tensor) -> bool:
    """Whether torch.compile or a CUDA graph records what is done, so that its shapes must not depend on contents."""
    return torch.compiler.is_compiling() or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


class TrellisHead(nn.Module):
    """The head of a model whose packed embedding is its matrix: y = x @ A^T from the embedding's own parameters.

    embedding: not a child, so that it stays in one place in the model and on disk. The head has no parameters of its own.
    """

    bias = None

    def __init__(self, embedding: TrellisEmbedding) -> None:
        super().__init__()
        self._tied = (embedding,)  # in a tuple nn.Module does not see it

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Leave out `weight`: transformers ties a head by setting it to the embedding's, which it is already."""
        if name != "weight":
            super().register_parameter(name, param)

    @property
    def weight(self) -> nn.Parameter:
        """The embedding's empty one."""
        return self.embedding.weight

    @property
    def embedding(self) -> TrellisEmbedding:
        """The embedding, as it is now."""
        return self._tied[0]

    @property
    def layout(self) -> PackedLayout:
        return self.embedding.layout

    @property
    def scale_in(self) -> nn.Parameter:
        return self.embedding.scale_in

    @property
    def scale_out(self) -> nn.Parameter:
        return self.embedding.scale_out

    @property
    def lut(self) -> nn.Parameter | None:
        return self.embedding.lut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: floating [..., I]. Returns [..., O] in x's dtype, computed in float32. Differentiable in x.

        Raises QtipError where the embedding's weights are not in memory.
        """
        trellis = self.embedding.trellis
        if trellis.is_meta:
            raise QtipError(
                "the head computes from the packed embedding, whose weights are not in memory",
                "load the model without offloading the embedding",
            )
        # Where a model is spread over devices, the two may have come to different ones.
        return packed_linear(x.to(trellis.device), (self,), trellis)[0].to(x.device)

    def extra_repr(self) -> str:
        return f"tied to a packed embedding of {self.embedding.num_embeddings} x {self.embedding.embedding_dim}"
