"""Owns the choice of a rate for every layer: a multiple-choice knapsack, least total loss within an exact budget of bytes.

Model of the loss (Q-Palette, arXiv 2509.20214): what layers add to it is a sum, each layer's part a function of its own rate.
Dynamic programming then finds the best table; it is exact where sizes are whole multiples of a common unit that is not too
small, and otherwise rounds sizes up, so that a budget is never exceeded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qtipcli.errors import QtipError, SettingsError

MOST_UNITS = 1 << 17
"""Units that a budget is divided into at most: 560 layers of a 70-billion-parameter model then take 73 MB and a few seconds.

Rounding up costs each layer less than a unit, together 560 / 2^17 = 0.4 % of the budget, which the greedy fill gives back.
"""


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to store a layer. bytes: exactly what it takes. loss: what it adds to the model's loss, in any unit."""

    bytes: int
    loss: float


def allocate(layers: Sequence[Sequence[Choice]], budget: int, fixed: int = 0) -> list[int]:
    """For each layer the index of its choice, so that the sum of losses is least and all bytes, with `fixed`, fit `budget`.

    layers: the choices of each, at least one, in any order. fixed: bytes that are taken whatever is chosen.
    Of choices that are equally good the smallest is taken; the same arguments give the same table.
    Raises SettingsError, naming the smallest size that is possible, where nothing fits; QtipError where a loss is not finite.
    """
    _check_finite(layers)
    kept = [_worthwhile(choices) for choices in layers]
    smallest = fixed + sum(layers[layer][order[0]].bytes for layer, order in enumerate(kept))
    if smallest > budget:
        raise SettingsError(f"a budget of {budget:,} bytes is too small", f"the smallest possible is {smallest:,} bytes")
    sorted_choices = [[choices[index] for index in order] for choices, order in zip(layers, kept, strict=True)]
    extras = [[choice.bytes - choices[0].bytes for choice in choices] for choices in sorted_choices]
    losses = [[choice.loss for choice in choices] for choices in sorted_choices]
    spare = min(budget - smallest, sum(each[-1] for each in extras))
    common = math.gcd(*(extra for each in extras for extra in each)) or 1
    unit = common * -(-(spare // common) // MOST_UNITS) or common
    taken = _least_loss([[-(-extra // unit) for extra in each] for each in extras], losses, spare // unit)
    if unit > common:
        _fill(taken, extras, losses, spare)
    return [order[place] for order, place in zip(kept, taken, strict=True)]


def smallest_bytes(layers: Sequence[Sequence[Choice]]) -> int:
    """What the layers take together at the least."""
    return sum(min(choice.bytes for choice in choices) for choices in layers)


def largest_bytes(layers: Sequence[Sequence[Choice]]) -> int:
    """What the layers take together when no choice of any of them would lower the loss further."""
    return sum(choices[_worthwhile(choices)[-1]].bytes for choices in layers)


def _worthwhile(choices: Sequence[Choice]) -> list[int]:
    """Indices of the choices that no other beats in both bytes and loss, from the smallest to the one with the least loss."""
    order = sorted(range(len(choices)), key=lambda index: (choices[index].bytes, choices[index].loss, index))
    kept: list[int] = []
    for index in order:
        if not kept or choices[index].loss < choices[kept[-1]].loss:
            kept.append(index)
    return kept


def _least_loss(units: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], capacity: int) -> list[int]:
    """The exact knapsack: for each layer the place of its choice. units: ascending, the first 0.

    `best[c]` is the least loss of the layers so far with at most c units.
    """
    best_C = np.zeros(capacity + 1)
    decided: list[np.ndarray] = []
    for sizes, values in zip(units, losses, strict=True):
        total_C = best_C + values[0]
        choice_C = np.zeros(capacity + 1, np.uint8)
        for place in range(1, len(sizes)):
            size = sizes[place]
            if size > capacity:
                break
            candidate = best_C[: capacity + 1 - size] + values[place]
            better = candidate < total_C[size:]
            total_C[size:][better] = candidate[better]
            choice_C[size:][better] = place
        best_C = total_C
        decided.append(choice_C)
    taken = []
    left = capacity
    for sizes, choice_C in zip(reversed(units), reversed(decided), strict=True):
        place = int(choice_C[left])
        taken.append(place)
        left -= sizes[place]
    return taken[::-1]


def _fill(taken: list[int], extras: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], spare: int) -> None:
    """Spend, in place, the bytes that rounding up left over: the change with the most loss saved per byte first."""
    left = spare - sum(sizes[place] for sizes, place in zip(extras, taken, strict=True))
    while True:
        best: tuple[float, int, int] | None = None
        for layer, (sizes, values) in enumerate(zip(extras, losses, strict=True)):
            now = taken[layer]
            for place in range(now + 1, len(sizes)):
                more = sizes[place] - sizes[now]
                gain = (values[now] - values[place]) / more
                if more <= left and (best is None or gain > best[0]):
                    best = gain, layer, place
        if best is None:
            return
        _, layer, place = best
        left -= extras[layer][place] - extras[layer][taken[layer]]
        taken[layer] = place


def _check_finite(layers: Sequence[Sequence[Choice]]) -> None:
    for number, choices in enumerate(layers):
        for choice in choices:
            if not math.isfinite(choice.loss):
                raise QtipError(f"layer {number} would add a loss of {choice.loss}", "look for NaN or infinite weights")
