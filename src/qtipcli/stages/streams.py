"""Owns the start of a stream: what the first block gets for each batch of rows, kept in memory or in a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from qtipcli.job.files import temporary_path
from qtipcli.model.inputs import BlockCall, BlockInput, capture_first_inputs
from qtipcli.model.skeleton import Skeleton
from qtipcli.stages.progress import Watcher
from qtipcli.tune.activations import Activations

DEFAULT_MEMORY_GIB = 4.0
"""Activations beyond this go to a file."""

CAPTURE_BYTES = 512 << 20
"""Of hidden states that are captured in front of the first block before they are stored."""


def start(
    skeleton: Skeleton, batches: Sequence[Tensor], names: Sequence[str], directory: Path, memory_gib: float, watcher: Watcher
) -> tuple[list[Activations], list[tuple[BlockCall, ...]]]:
    """Equal streams, one for each of `names`, that stand before the first block; and each batch's calls of the blocks.

    batches: int64 [rows, context] each; without any the streams are empty. directory: where they go where they take more than
    `memory_gib` GiB together.
    """
    if not batches:
        return [Activations([], skeleton.dtype) for _ in names], []
    first = capture_first_inputs(skeleton, batches[0][:1], 1)[0].hidden
    token_bytes = first[0, 0].nbytes
    shapes = [(*rows.shape, *first.shape[2:]) for rows in batches]
    total = len(names) * sum(rows.numel() for rows in batches) * token_bytes
    in_memory = total <= memory_gib * 2**30
    if not in_memory:
        watcher.note(f"{total / 2**30:.1f} GiB of activations go to a file in {directory}")
    streams = [Activations(shapes, first.dtype, None if in_memory else temporary_path(directory / name)) for name in names]
    calls: list[tuple[BlockCall, ...]] = []
    for captured in _captured(skeleton, batches, max(1, CAPTURE_BYTES // (batches[0].numel() * token_bytes))):
        for stream in streams:
            stream.write(len(calls), captured.hidden)
        calls.append(captured.calls)
    return streams, calls


def _captured(skeleton: Skeleton, batches: Sequence[Tensor], at_once: int) -> Iterator[BlockInput]:
    """What the first block gets, batch by batch; `at_once` are captured together."""
    for place in range(0, len(batches), at_once):
        yield from capture_first_inputs(skeleton, batches[place : place + at_once])


def batch_at(stream: Activations, calls: Sequence[tuple[BlockCall, ...]], index: int) -> BlockInput:
    """One batch of a stream as the next block gets it."""
    return BlockInput(stream.read(index), calls[index])


class StoredInput(BlockInput):
    """One batch of a stream, which is read when it is asked for and written when it is assigned."""

    def __init__(self, stream: Activations, index: int, calls: tuple[BlockCall, ...]) -> None:
        self._stream, self._index, self.calls = stream, index, calls

    @property
    def hidden(self) -> Tensor:  # type: ignore[override]
        """As the next block gets it."""
        return self._stream.read(self._index)

    @hidden.setter
    def hidden(self, tensor: Tensor) -> None:
        self._stream.write(self._index, tensor)


def first_inputs(
    skeleton: Skeleton, batches: Sequence[Tensor], directory: Path, memory_gib: float, watcher: Watcher, name: str = "inputs"
) -> list[BlockInput]:
    """One stream, called `name`, as batches that are read from it and written to it as they are used."""
    (stream,), calls = start(skeleton, batches, [name], directory, memory_gib, watcher)
    return [StoredInput(stream, index, each) for index, each in enumerate(calls)]
