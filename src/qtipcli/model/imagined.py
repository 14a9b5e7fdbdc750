"""Owns a model that is only imagined: the shapes of a checkpoint with weights that are made up, to try out what a job will do.

Its blocks run as the real ones do, in the same time and memory. Nothing of the checkpoint but its headers is read, save two
matrices that a local one stores separately although its config ties them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qtipcli.model.reading import Stored
from qtipcli.model.skeleton import Skeleton
from qtipcli.model.source import ModelSource

_PERIOD = 65_521
"""Random values that are drawn, and repeated: a prime, so that no two rows of a matrix are alike. Drawing all takes seconds."""


class Imagined(Skeleton):
    """A Skeleton whose tensors are made up where they would be loaded; `read` gives them on meta.

    Inside the blocks they take the memory that the real ones take. Outside, a matrix takes that of one row and one column.
    """

    def _stored(self) -> Stored:
        self._headers = _Headers(self.source)
        return self._headers

    def _load_whole(self) -> dict[str, Tensor]:
        floats = {self.source.dtype(name) for name in self.source.tensor_names if self.source.dtype(name).is_floating_point}
        widest = max(floats, key=lambda dtype: (dtype.itemsize, str(dtype)), default=torch.float32)
        state = self.model.state_dict().items()
        return {
            name: torch.empty_like(tensor, dtype=widest if tensor.is_floating_point() else None, device="meta")
            for name, tensor in state
        }

    def _untie_what_differs(self) -> None:
        apart = [name for name, original in self.tied.items() if not self._reader.is_same(name, original)]
        if not apart:
            return
        if not all(shard.is_file() for shard in self.source.shards):
            self.notes.append(f"{apart[0]} is tied in the config but stored by itself: it is taken to be equal")
            return
        self._headers.opens_files = True
        try:
            super()._untie_what_differs()
        finally:
            self._headers.opens_files = False

    def _make_real(self, owner: nn.Module, leaf: str, name: str) -> None:
        kind = owner._parameters if leaf in owner._parameters else owner._buffers
        like = kind[leaf]
        assert like is not None, "only tensors that are there are made real"
        if kind is owner._buffers and not like.is_meta:
            return
        in_block = any(name.startswith(f"{prefix}.") for prefix, _ in self.blocks)
        dtype = like.dtype
        tensor = _dense(like.shape, dtype) if in_block or like.ndim < 2 else _overlapping(like.shape, dtype)
        tensor = tensor.to(self.device)
        kind[leaf] = nn.Parameter(tensor, requires_grad=False) if kind is owner._parameters else tensor


class _Headers:
    """Tensors on meta, of the shapes and dtypes that the checkpoint's headers say; or its own, while opens_files is set."""

    def __init__(self, source: ModelSource) -> None:
        self._source = source
        self.opens_files = False

    def read(self, name: str, row: int | None = None) -> Tensor:
        if self.opens_files:
            return self._source.read(name, row)
        tensor = torch.empty(self._source.shape(name), dtype=self._source.dtype(name), device="meta")
        return tensor if row is None else tensor[row]


def _dense(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Ones for a vector; else random values, floating ones of a size that leaves that of activations as it is."""
    if len(shape) < 2:
        return torch.ones(shape, dtype=dtype)
    count = shape.numel()
    return _draws(_PERIOD, shape[-1], dtype).repeat(-(-count // _PERIOD))[:count].view(shape)


def _overlapping(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A matrix whose rows are cut from one random vector, each one value further on: as unlike as random ones."""
    draws = _draws(shape[:-1].numel() + shape[-1], shape[-1], dtype)
    return draws.as_strided((shape[0], shape[-1]), (1, 1)) if len(shape) == 2 else draws[: shape[-1]].expand(shape)


def _draws(count: int, width: int, dtype: torch.dtype) -> Tensor:
    """Random values of a matrix with rows of `width`; any whole numbers are the words of a valid walk."""
    generator = torch.Generator().manual_seed(0)
    if not dtype.is_floating_point:
        return torch.randint(torch.iinfo(dtype).min, torch.iinfo(dtype).max, (count,), generator=generator, dtype=dtype)
    return (torch.randn(count, generator=generator) * width**-0.5).to(dtype)
