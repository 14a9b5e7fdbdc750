"""Owns the measurement that a prediction rests on: what one decoder block of made-up weights takes in time and in memory.

The stages' own code is run: a block takes as long whatever its weights are, and as much memory. What grows with the text is
measured on a part of it; what grows with a matrix, on small matrices of the same proportions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtipcli.model.imagined import Imagined
from qtipcli.model.inputs import BlockInput, capture_first_inputs, through_block
from qtipcli.model.linears import HessianRecorder, InputGroup, OutputRecorder, input_groups
from qtipcli.model.places import signature
from qtipcli.model.skeleton import Skeleton
from qtipcli.stages import backward, calibrate
from qtipcli.stages.live_bytes import LiveBytes
from qtipcli.stages.prefix import Prefix
from qtipcli.stages.timing import elapsed
from qtipcli.tune.activations import Activations

BLOCK_SECONDS = 4.0
"""Spent on passes through a block, of ten in all."""

PASSES = 14.0
"""Forward passes that all measurements of a block take together, about."""

PROBE_TOKENS = 64
"""Tokens of the pass that decides how many are measured with, and of the one that counts memory."""


LARGEST_HEAD = 8192
"""Rows of the head that are measured with."""


@dataclass(frozen=True, slots=True)
class Passes:
    """What one token costs on its way through one decoder block. Seconds, and bytes alive beside weights and sums.

    calibrate, output_side, prefix: all passes of that stage with its sums. forward: one plain pass.
    *_bytes: of a forward pass; of the pass that finds which layers share an input; of a pass back; of the passes of the
    quantized prefix. kept_bytes: what the prefix keeps of the original's pass, until the block is rounded.
    tokens: that were measured with.
    """

    calibrate: float
    output_side: float
    prefix: float
    forward_bytes: float
    grouping_bytes: float
    backward_bytes: float
    prefix_bytes: float
    kept_bytes: float
    tokens: int


def alike(skeleton: Skeleton) -> list[tuple[int, ...]]:
    """Indices of the blocks, those together that compute alike on tensors of the same shapes."""
    found: dict[Any, list[int]] = {}
    for index, (_, block) in enumerate(skeleton.blocks):
        shapes = tuple((parameter.shape, parameter.dtype) for parameter in block.parameters())
        found.setdefault((signature(block), shapes), []).append(index)
    return [tuple(indices) for indices in found.values()]


def find_groups(skeleton: Imagined, index: int, row: Tensor) -> list[InputGroup]:
    """Which linears of block `index` share an input. row: int64 [1, tokens]."""
    one_input = capture_first_inputs(skeleton, row, 1)[0]
    skeleton.materialize(index)
    try:
        return input_groups(skeleton, index, one_input)
    finally:
        skeleton.release(index)


def measure_passes(
    skeleton: Imagined, index: int, groups: Sequence[InputGroup], rows: Tensor, two_sided: bool, prefix: bool, share: int = 1
) -> Passes:
    """Run the passes of all stages through block `index`.

    rows: int64 [rows, context], as many as go through a block at once; fewer are taken where they would take too long.
    two_sided, prefix: whether the job has those passes. share: kinds of blocks that the time is shared among.
    """
    try:
        probe = rows[:1, :PROBE_TOKENS]
        memory = _Block(skeleton, index, groups, probe)
        memory.forward()  # the first pass starts threads and asks for memory
        seconds = elapsed(memory.forward, skeleton.device)
        affordable = int(BLOCK_SECONDS / share / PASSES / max(seconds, 1e-6) * probe.shape[1])
        if affordable >= rows.shape[1]:
            part = rows[: max(1, affordable // rows.shape[1])]
        else:
            part = rows[:1, : max(PROBE_TOKENS, affordable)]
        block = _Block(skeleton, index, groups, part)
        tokens = part.numel()
        kept, prefix_seconds, prefix_bytes = block.prefix() if prefix else (0.0, 0.0, 0.0)
        return Passes(
            calibrate=elapsed(block.calibrate, skeleton.device) / tokens,
            output_side=(elapsed(block.forward, skeleton.device) + elapsed(block.backward, skeleton.device)) / tokens
            if two_sided
            else 0.0,
            prefix=prefix_seconds / tokens,
            forward_bytes=_peak(memory.forward) / probe.numel(),
            grouping_bytes=_peak(memory.group) / probe.numel(),
            backward_bytes=_peak(memory.pass_back) / probe.numel() if two_sided else 0.0,
            prefix_bytes=prefix_bytes,
            kept_bytes=kept,
            tokens=tokens,
        )
    finally:
        skeleton.release(index)


class _Block:
    """One block and some rows on their way into it."""

    def __init__(self, skeleton: Imagined, index: int, groups: Sequence[InputGroup], rows: Tensor) -> None:
        self.skeleton, self.index, self.groups, self.rows = skeleton, index, groups, rows
        self.input: BlockInput = capture_first_inputs(skeleton, rows, len(rows))[0]
        self.block = skeleton.materialize(index)
        self.recorder = HessianRecorder(self.block, groups)
        self.outputs = OutputRecorder(self.block)

    @torch.no_grad()
    def forward(self) -> None:
        calibrate.forward(self.skeleton, self.index, [BlockInput(self.input.hidden, self.input.calls)])

    @torch.no_grad()
    def calibrate(self) -> None:
        with self.recorder:
            self.forward()

    def group(self) -> None:
        input_groups(self.skeleton, self.index, self.input)

    def backward(self) -> None:
        with self.outputs:
            self.pass_back()

    def pass_back(self) -> None:
        """As _Backward._backward does it with one batch."""
        hidden = self.input.hidden.to(self.skeleton.device, copy=True).requires_grad_(True)
        output = through_block(self.skeleton, self.index, hidden.clone(), self.input.calls[self.index])
        if output.requires_grad:
            torch.autograd.grad(output, hidden, torch.ones_like(output))

    def prefix(self) -> tuple[float, float, float]:
        """(bytes kept for each token, seconds of all passes of the quantized prefix, bytes for each token of their largest)."""
        name = self.skeleton.blocks[self.index][0]
        named = [[f"{name}.{layer}" for layer in group.names] for group in self.groups if group.called]
        nowhere = Path()
        streams = [Activations([tuple(self.input.hidden.shape)], self.input.hidden.dtype) for _ in range(2)]
        for stream in streams:
            stream.write(0, self.input.hidden)
        prefix = Prefix(self.skeleton, *streams, [self.input.calls], self.rows[:1], nowhere, float("inf"))
        self.skeleton.materialize(self.index)
        prefix.enter(self.index, named)  # finds the places, once for all blocks alike
        with LiveBytes() as entering:
            prefix.enter(self.index, named)
        kept = prefix.kept_bytes
        seconds = elapsed(lambda: prefix.enter(self.index, named), self.skeleton.device)
        for names in named:
            seconds += elapsed(lambda names=names: prefix.moments(self.index, names, {}), self.skeleton.device)
        seconds += elapsed(lambda: prefix.advance(self.index, {}), self.skeleton.device)
        prefix.close()
        return kept / self.rows.numel(), seconds, max(0.0, entering.peak - kept) / self.rows.numel()


def head_seconds(width: int, vocabulary: int, device: torch.device) -> float:
    """Seconds a token of the head, a drawn gradient and back: measured on a part of the vocabulary, with which it grows."""
    part = min(vocabulary, LARGEST_HEAD)
    weight = torch.full((part, width), 1 / width, device=device, requires_grad=False)
    hidden = torch.ones(PROBE_TOKENS, width, device=device, requires_grad=True)

    def once() -> None:
        logits = hidden @ weight.T
        torch.autograd.grad(logits, hidden, backward.drawn_gradient(logits.detach(), 0))

    once()
    return elapsed(once, device) / PROBE_TOKENS * vocabulary / part


def _peak(call: Callable[[], None]) -> int:
    with LiveBytes() as live:
        call()
    return live.peak
