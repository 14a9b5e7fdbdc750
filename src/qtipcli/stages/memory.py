"""Owns the rule that predicts a job's peak memory: for each phase of a stage, what lies in memory at once (docs/memory.md).

Pure functions of shapes and settings, and of what a token takes in a block and a group in its rounding, which are measured
(stages/rates.py, stages/rounding_rates.py). In bytes, on top of what the process takes before it starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qtipcli.stages.backward import LEAST_BATCHES, MICRO_TOKENS, MOST_TOKENS
from qtipcli.stages.calibrate import BATCH_TOKENS
from qtipcli.stages.forward_rates import HEAP_TENSOR
from qtipcli.stages.rates import Passes
from qtipcli.stages.rounding_rates import Group
from qtipcli.stages.streams import DEFAULT_MEMORY_GIB
from qtipcli.stages.tuning_rates import Head, Tuning, TuningText

FLOAT = 4
"""Bytes of a value in memory: everything is computed in float32."""

NORM_COPIES = 4
"""Tensors of the hidden states' size that the final norm of a model makes of them."""

LOGIT_COPIES = 3
"""The logits of a batch, their probabilities, and those cumulated."""


BLOCK_PHASES = (
    "calibrate, inputs of a block",
    "output side, gradients",
    "output side, dampings",
    "quantize, rounding of a group",
    "quantize, what a group is given",
    "quantize, on to the next block",
)
"""How the phases begin in which no more than one block is read."""

END_PHASES = ("in front of the blocks", "output side, predictions")
"""How those end in which what lies outside the blocks is read, and after that something else is done."""

HEAP_COPIES = 2
"""What is kept in the heap among tensors that come and go leaves as much between itself: measured, docs/memory.md."""


EARLY = ("calibrate, in front of the blocks", "calibrate, inputs of a block", "output side, predictions")
"""Phases in front of the first that loads the compiled kernels, a hundred megabytes."""

HEAP_WASTE = 1.4
"""What waits for the way back in the heap takes over its own size: 1.3 and 1.5 were measured on the two smallest models."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """What of a model decides about memory. Bytes in float32: one block with the most; its linears; everything outside the
    blocks but the head; the head where it is not tied; one token's hidden states. read: of the largest stored tensor, and
    block_read: of the largest that is stored for a block, as stored.
    """

    blocks: int
    block: int
    linears: int
    outer: int
    head: int
    token: int
    vocabulary: int
    read: int
    block_read: int = 0

    def reading(self, phase: str) -> int:
        """Of the largest tensor that is read while what the phase takes is there; those that load the model's ends count it."""
        if phase.endswith(END_PHASES):
            return 0
        return self.block_read if phase.startswith(BLOCK_PHASES) else self.read


@dataclass(frozen=True, slots=True)
class Text:
    """Calibration text: rows windows of context tokens each. slices: that sums over it are taken in."""

    rows: int
    context: int
    slices: int = 1

    @property
    def tokens(self) -> int:
        """All."""
        return self.rows * self.context

    @property
    def batch(self) -> int:
        """Tokens that go through a block at once."""
        most = -(-self.rows // min(self.slices, self.rows))
        return min(most, max(1, BATCH_TOKENS // self.context)) * self.context

    @property
    def copies(self) -> int:
        """Of each sum over the text: the running total and that of a slice, where there is more than one."""
        return 1 if min(self.slices, self.rows) == 1 else 2

    @property
    def rows_back(self) -> int:
        """Windows that go back through the model."""
        return min(self.rows, max(1, MOST_TOKENS // self.context))

    @property
    def batch_back(self) -> int:
        """Tokens that go back through a block at once."""
        return max(1, min(MICRO_TOKENS // self.context, self.rows_back // LEAST_BATCHES)) * self.context


@dataclass(frozen=True, slots=True)
class Student:
    """The packed model, whole. loaded: bytes, with what of its files stays mapped. decoded: of its layers as they are trained;
    0 where they are decoded in every product. vocabulary: logits of a token. gib: activations beyond it are in a file.
    """

    loaded: int
    decoded: int
    vocabulary: int
    gib: float


def held(size: int, at_once: int, gib: float = DEFAULT_MEMORY_GIB) -> int:
    """Bytes in memory of activations of `size` bytes, `at_once` of them worked on: beyond the limit they are in a file."""
    return size if size <= gib * 2**30 else at_once


def calibrate_phases(
    sizes: Sizes,
    text: Text,
    passes: Passes,
    groups: Sequence[Group],
    outputs: Mapping[int, int],
    two_sided: bool,
    memory_gib: float = DEFAULT_MEMORY_GIB,
) -> dict[str, int]:
    """Phase -> bytes. groups: of the block with the most. outputs: outputs of a layer -> bytes to choose its damping.

    memory_gib: of activations in memory.
    """
    hidden = held(text.tokens * sizes.token, text.batch * sizes.token, memory_gib)
    inputs = sum(FLOAT * group.inputs**2 for group in groups)
    passing = text.copies * inputs + (passes.forward_bytes + sizes.token) * text.batch
    on_the_way = max(passes.grouping_bytes * text.batch, passing, 2 * inputs)
    found = {
        "calibrate, in front of the blocks": sizes.outer
        + max(sizes.read, sizes.block, hidden + NORM_COPIES * text.batch * sizes.token),
        "calibrate, inputs of a block": hidden + sizes.block + int(on_the_way),
    }
    if not two_sided:
        return found
    back, rows = text.batch_back, text.rows_back * text.context
    streams = held((sizes.blocks + 1) * rows * sizes.token, 2 * back * sizes.token, memory_gib)
    squares = [FLOAT * each**2 for group in groups for each in group.outputs]
    return found | {
        "output side, predictions": streams
        + sizes.outer
        + sizes.head
        + max(sizes.read, LOGIT_COPIES * FLOAT * back * sizes.vocabulary + NORM_COPIES * back * sizes.token),
        "output side, gradients of a block": streams
        + sizes.block
        + (1 + text.copies) * sum(squares)
        + int(passes.backward_bytes * back),
        "output side, dampings of a block": streams + sum(squares) + max(outputs.values(), default=0),
    }


def quantize_phases(
    sizes: Sizes,
    text: Text,
    passes: Passes,
    groups: Sequence[Group],
    rounding: Sequence[int],
    prefix: bool,
    changed: Sequence[bool] | None = None,
    memory_gib: float = DEFAULT_MEMORY_GIB,
) -> dict[str, int]:
    """Phase -> bytes. groups: of the block with the most, rounding: bytes that rounding each of them takes.

    changed: whether changes of its input are summed for each; None stands for yes. memory_gib: of activations in memory, for
    the streams and for what is kept, each.
    """
    streams = kept = 0
    if prefix:
        streams = held(2 * text.tokens * sizes.token, 2 * text.batch * sizes.token, memory_gib)
        kept = kept_of(text, sizes, passes, memory_gib)
    flowing = streams + kept + sizes.block
    found: dict[str, int] = {}
    for group, needed, is_changed in zip(groups, rounding, changed or [True] * len(groups), strict=True):
        weights = FLOAT * group.inputs * sum(group.outputs)
        squares = 4 if is_changed else 2
        summed = text.copies * (squares * FLOAT * group.inputs**2 + 2 * weights)
        sums = summed + int(passes.prefix_bytes * text.batch) if prefix else 0
        phases = {"quantize, rounding of a group": needed, "quantize, what a group is given": sums}
        for phase, bytes_ in phases.items():
            found[phase] = max(found.get(phase, 0), flowing + bytes_)
    if prefix:
        in_front = NORM_COPIES * text.batch * sizes.token
        found["quantize, in front of the blocks"] = sizes.outer + max(sizes.read, sizes.block, streams + in_front)
        passing = int((passes.forward_bytes + sizes.token) * text.batch)
        found["quantize, on to the next block"] = flowing + sizes.linears + passing
    return found


def kept_of(text: Text, sizes: Sizes, passes: Passes, gib: float = DEFAULT_MEMORY_GIB) -> int:
    """Bytes of what the quantized prefix keeps of a block, and of the holes that it leaves in the heap."""
    kept = held(int(passes.kept_bytes * text.tokens), int(passes.kept_bytes * text.batch), gib)
    return kept * (HEAP_COPIES if text.batch * sizes.token < HEAP_TENSOR else 1)


def block_tuning_phases(
    sizes: Sizes, text: TuningText, tuning: Tuning, passing: int, masters: int, gib: float = DEFAULT_MEMORY_GIB
) -> dict[str, int]:
    """Phase -> bytes. passing: of a piece on its way through an original block; masters: of what is trained of a block."""
    streams = held(2 * text.tokens * sizes.token, 2 * text.at_once * sizes.token, gib)
    flowing = streams * (HEAP_COPIES if text.at_once * sizes.token < HEAP_TENSOR else 1) + sizes.block
    return {
        "by block, in front of the blocks": sizes.outer + max(sizes.block, streams // 2),
        "by block, the original": flowing + passing,
        "by block, training": flowing + tuning.walks + masters + tuning.block.of(text.at_once),
    }


def verdict(sizes: Sizes, text: TuningText, student: Student, head: Head) -> int:
    """Bytes of judging the packed model, its layers packed, on the held-out windows."""
    rows = held(text.heldout * text.context * sizes.token, text.at_once * sizes.token, student.gib)
    logits = int(head.judged * student.vocabulary * text.at_once)
    return student.loaded + sizes.outer + sizes.head + rows + logits


def end_tuning_phases(
    sizes: Sizes, text: TuningText, tuning: Tuning, passing: int, masters: int, student: Student, head: Head, recomputed: bool
) -> dict[str, int]:
    """Phase -> bytes. passing: of a piece in an original block. recomputed: only what enters a block waits for the way back."""
    rows = held(text.tokens * sizes.token, text.at_once * sizes.token, student.gib)
    block = tuning.block.of(text.at_once)
    kept = sizes.blocks * text.at_once * sizes.token + block if recomputed else tuning.kept.of(text.at_once)
    logits = head.logit * student.vocabulary * text.at_once
    logits *= HEAP_WASTE if FLOAT * student.vocabulary * text.at_once < HEAP_TENSOR else 1
    back = int(kept * HEAP_WASTE if text.at_once * sizes.token < HEAP_TENSOR else kept)
    back += max(int(logits), 0 if recomputed else block)
    around = student.loaded + rows
    return {
        "end to end, teacher": around + max(sizes.outer, sizes.block + passing),
        "end to end, training": around + student.decoded + sizes.outer + sizes.head + masters + back,
    }
