"""Owns activations between blocks: a row of batches, in memory up to a limit and beyond it in a file.

The file is read and written, not mapped: pages of a map would count as the process's memory. It has no name once it is open,
so nothing is left of it when the process ends, however it ends.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from qtipcli.errors import storage_error


class Activations:
    """Batches of hidden states, each replaced as a whole. Batch i has the shape shapes[i]; all are of one dtype.

    Args:
        shapes: of the batches.
        dtype: of all.
        path: where the file goes if they do not stay in memory; None keeps them there.

    Raises StorageError where the file cannot be written.
    """

    def __init__(self, shapes: list[tuple[int, ...]], dtype: torch.dtype, path: Path | None = None) -> None:
        self.shapes, self.dtype = shapes, dtype
        sizes = [torch.Size(shape).numel() * dtype.itemsize for shape in shapes]
        self._offsets = [sum(sizes[:index]) for index in range(len(sizes))]
        self._held: list[Tensor | None] = [None] * len(shapes)
        self._path = path
        self._descriptor: int | None = None
        if path is not None:
            try:
                path.unlink(missing_ok=True)
                self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                path.unlink()
            except OSError as error:
                raise storage_error(error, path) from error

    def __len__(self) -> int:
        return len(self.shapes)

    def read(self, index: int) -> Tensor:
        """Batch `index`, on the CPU; do not write to it."""
        if self._descriptor is None:
            held = self._held[index]
            assert held is not None, "a batch is written before it is read"
            return held
        tensor = torch.zeros(self.shapes[index], dtype=self.dtype)
        view = _bytes(tensor)
        done = 0
        try:
            while done < len(view):
                got = os.preadv(self._descriptor, [view[done:]], self._offsets[index] + done)
                if not got:
                    raise OSError(5, "the file ends early")
                done += got
        except OSError as error:
            raise storage_error(error, self._path, "read") from error
        return tensor

    def write(self, index: int, tensor: Tensor) -> None:
        """Replace batch `index`. Raises StorageError."""
        tensor = tensor.detach().to("cpu", self.dtype).contiguous()
        if self._descriptor is None:
            self._held[index] = tensor
            return
        view = _bytes(tensor)
        done = 0
        try:
            while done < len(view):
                done += os.pwrite(self._descriptor, view[done:], self._offsets[index] + done)
        except OSError as error:
            raise storage_error(error, self._path) from error

    def close(self) -> None:
        """Give the file's space back."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
