"""Owns which windows make a step of training, and which of them one of several processes takes.

A step's windows are neighbours in the text that was drawn, whoever takes them: neither the number of processes nor how much one
of them computes at once changes what a step is, so that either changes the order of sums and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from qtipcli.tune.descent import largest_divisor


@dataclass(frozen=True, slots=True)
class Share:
    """What one process computes.

    pieces: int64 [rows, context] each: what goes through the model at once; no piece holds rows of two steps.
    steps: for each step of an epoch, the pieces that belong to it; none where a short last step leaves nothing to this process.
    rows: for each step, its windows in all processes. held: the pieces that are never trained on.
    """

    pieces: tuple[Tensor, ...]
    steps: tuple[range, ...]
    rows: tuple[int, ...]
    held: range


def share_of(tokens: Tensor, heldout: int, batch: int, most_rows: int, rank: int = 0, world: int = 1) -> Share:
    """The share of process `rank` among `world`.

    tokens: int64 [rows, context], the last `heldout` of them never trained on. batch: windows in a step.
    most_rows: that one process may compute at once; a step that is larger goes through in equal pieces.
    """
    micro = largest_divisor(-(-batch // world), most_rows)
    pieces: list[Tensor] = []

    def take(rows: Tensor) -> range:
        start = len(pieces)
        own = rows[len(rows) * rank // world : len(rows) * (rank + 1) // world]
        pieces.extend(own.split(micro) if len(own) else ())
        return range(start, len(pieces))

    groups = tokens[: len(tokens) - heldout].split(batch) if heldout < len(tokens) else ()
    steps = tuple(take(group) for group in groups)
    held = take(tokens[len(tokens) - heldout :])
    return Share(tuple(pieces), steps, tuple(map(len, groups)), held)
