"""Owns the two streams of the quantized prefix: what the original blocks make of the text, and what the rounded ones do.

Layers are rounded in the order in which they are called. For each group of layers with one input both streams run through the
block as it stands, its rounded layers in place in one of them, to learn what the group is given and what is missing behind it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qtipcli.errors import QtipError
from qtipcli.job.interrupt import checkpoint
from qtipcli.model.inputs import BlockCall, BlockInput, capture_first_inputs, run_block
from qtipcli.model.linears import CHUNK_TOKENS
from qtipcli.model.places import PROBE_TOKENS, Place, find_places, look, signature
from qtipcli.model.skeleton import Skeleton
from qtipcli.quant.correction import Evidence
from qtipcli.stages import streams
from qtipcli.tune.activations import Activations

HELDOUT_SHARE = 8
"""One row of text in this many decides whether a correction made of the others helps."""


@dataclass(frozen=True)
class Moments:
    """What a group of layers is given, and what is missing there.

    hessian_II: E[x x^T] of the group's input x, float32. tokens: in that mean. missing: full name of a layer -> what is missing
    at the place behind it (model.places), on all tokens and on the held-out ones. Empty where the streams were not compared, or
    cannot be: an expert sees other tokens in each.
    """

    hessian_II: Tensor
    tokens: int
    missing: Mapping[str, tuple[Evidence, Evidence]]


class Prefix:
    """Both streams in front of one block after another.

    original, quantized: hidden states of each batch. calls: the other arguments of each batch's blocks.
    row: int64 [1, context], any tokens: a few of them probe the blocks.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        original: Activations,
        quantized: Activations,
        calls: Sequence[tuple[BlockCall, ...]],
        row: Tensor,
    ) -> None:
        self._skeleton, self._original, self._quantized, self._calls = skeleton, original, quantized, calls
        self._probe: BlockInput = capture_first_inputs(skeleton, row[:, :PROBE_TOKENS], 1)[0]
        self._found: dict[object, dict[str, Place]] = {}
        self._heldout = _heldout_tokens([tuple(shape[:2]) for shape in quantized.shapes])

    def moments(self, index: int, names: Sequence[str], rounded: Mapping[str, Tensor]) -> Moments:
        """Of layers of block `index` that share one input; the block is materialized.

        names: full names. rounded: full name -> dense matrix [O, I] of the layers of the block that are rounded so far.
        Raises QtipError where a value is not finite.
        """
        prefix, block = self._skeleton.blocks[index]
        short = {name.removeprefix(f"{prefix}."): name for name in names}
        places = {name: place for name, place in self._places(index).items() if name in short}
        first = next(iter(short))
        size, device = block.get_submodule(first).in_features, self._skeleton.device
        hessian_II, heldout_II = (torch.zeros(size, size, device=device) for _ in range(2))
        rows = {name: block.get_submodule(name).out_features for name in places}
        missing, heldout = ({name: torch.zeros(rows[name], size, device=device) for name in places} for _ in range(2))
        tokens = heldout_tokens = 0
        for batch in range(len(self._quantized)):
            _, before = look(self._skeleton, index, streams.batch_at(self._original, self._calls, batch), first, places)
            with _replaced(block, prefix, rounded):
                quantized = streams.batch_at(self._quantized, self._calls, batch)
                inputs, after = look(self._skeleton, index, quantized, first, places)
            for x_NI in inputs:
                _add(hessian_II, x_NI, x_NI)
                tokens += len(x_NI)
            if not places:
                continue
            kept = self._heldout[batch].to(device)
            heldout_tokens += int(kept.sum())
            _add(heldout_II, inputs[0][kept], inputs[0][kept])
            for name in places:
                difference_NO = before[name] - after[name]
                _add(missing[name], difference_NO, inputs[0])
                _add(heldout[name], difference_NO[kept], inputs[0][kept])
        if not all(bool(torch.isfinite(total).all()) for total in (hessian_II, *missing.values())):
            raise QtipError(
                f"layer {names[0]} is given NaN or infinite values",
                "the model overflows on this text: leave out this text, or quantize with --original-prefix",
            )
        found = {
            short[name]: (Evidence(hessian_II, missing[name], tokens), Evidence(heldout_II, heldout[name], heldout_tokens))
            for name in places
        }
        return Moments(hessian_II / max(tokens, 1), tokens, found)

    def advance(self, index: int, rounded: Mapping[str, Tensor]) -> None:
        """Take both streams through block `index`, which is materialized."""
        prefix, block = self._skeleton.blocks[index]
        for batch in range(len(self._quantized)):
            checkpoint()
            self._forward(index, self._original, batch)
            with _replaced(block, prefix, rounded):
                self._forward(index, self._quantized, batch)

    def close(self) -> None:
        """Give files back."""
        self._original.close()
        self._quantized.close()

    def _forward(self, index: int, stream: Activations, batch: int) -> None:
        stream.write(batch, run_block(self._skeleton, index, streams.batch_at(stream, self._calls, batch)))

    def _places(self, index: int) -> dict[str, Place]:
        kind = signature(self._skeleton.blocks[index][1])
        if kind not in self._found:
            self._found[kind] = find_places(self._skeleton, index, self._probe)
        return self._found[kind]


def _heldout_tokens(shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """For batches of these [rows, context], which of their tokens are held out: those of every eighth row, or of the last."""
    count = sum(rows for rows, _ in shapes)
    share = min(HELDOUT_SHARE, count)
    held = torch.arange(count) % share == share - 1 if count > 1 else torch.zeros(count, dtype=torch.bool)
    parts = held.split([rows for rows, _ in shapes])
    return [part.repeat_interleave(context) for part, (_, context) in zip(parts, shapes, strict=True)]


def _add(sum_JI: Tensor, y_NJ: Tensor, x_NI: Tensor) -> None:
    """sum += y^T x, in chunks that fix the order of the sum."""
    for y, x in zip(y_NJ.split(CHUNK_TOKENS), x_NI.split(CHUNK_TOKENS), strict=True):
        sum_JI.addmm_(y.T.to(torch.float32), x.to(torch.float32))


@contextlib.contextmanager
def _replaced(block: nn.Module, prefix: str, matrices: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, these layers of the block have these weights."""
    own = {name: block.get_submodule(name.removeprefix(f"{prefix}.")).weight for name in matrices}
    kept = {name: weight.data for name, weight in own.items()}
    for name, matrix_OI in matrices.items():
        own[name].data = matrix_OI
    try:
        yield
    finally:
        for name, tensor in kept.items():
            own[name].data = tensor
