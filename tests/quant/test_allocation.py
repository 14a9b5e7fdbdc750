"""The knapsack that gives layers their rates.

Oracles: all combinations, one by one; the budget itself.
"""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qtipcli.errors import QtipError, SettingsError
from qtipcli.quant import allocation
from qtipcli.quant.allocation import Choice, allocate, largest_bytes, smallest_bytes

CHOICE = st.builds(Choice, st.integers(0, 40).map(lambda size: 48 * size), st.integers(0, 1000).map(lambda loss: loss / 64))
"""Losses are multiples of 1/64, so that sums are exact in any order."""

LAYERS = st.lists(st.lists(CHOICE, min_size=1, max_size=4), min_size=1, max_size=5)


def total(layers: list[list[Choice]], taken: tuple[int, ...] | list[int]) -> tuple[float, int]:
    """(loss, bytes) of a table."""
    chosen = [choices[index] for choices, index in zip(layers, taken, strict=True)]
    return sum(choice.loss for choice in chosen), sum(choice.bytes for choice in chosen)


def best(layers: list[list[Choice]], budget: int) -> float | None:
    """The least loss of all combinations that fit; None where none does."""
    every = [total(layers, taken) for taken in itertools.product(*(range(len(choices)) for choices in layers))]
    return min((loss for loss, size in every if size <= budget), default=None)


@given(LAYERS, st.integers(0, 200).map(lambda size: 48 * size), st.integers(0, 500))
@settings(max_examples=200, deadline=None)
def test_it_is_the_best_of_all_combinations(layers: list[list[Choice]], spare: int, fixed: int) -> None:
    budget = fixed + spare
    expected = best(layers, spare)
    if expected is None:
        with pytest.raises(SettingsError) as caught:
            allocate(layers, budget, fixed)
        assert f"{fixed + smallest_bytes(layers):,} bytes" in caught.value.hint
        return
    loss, size = total(layers, allocate(layers, budget, fixed))
    assert size + fixed <= budget
    assert loss == expected


@given(LAYERS, st.integers(0, 9600))
@settings(max_examples=100, deadline=None)
def test_coarse_units_fit_and_leave_nothing_that_would_still_fit(layers: list[list[Choice]], budget: int) -> None:
    """With 8 units for the whole budget, sizes are rounded up by a lot: never over it, and no layer could still be improved."""
    if best(layers, budget) is None:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocation, "MOST_UNITS", 8)
        taken = allocate(layers, budget)
    loss, size = total(layers, taken)
    assert size <= budget
    for layer, choices in enumerate(layers):
        for index in range(len(choices)):
            other_loss, other_size = total(layers, [*taken[:layer], index, *taken[layer + 1 :]])
            assert other_size > budget or other_loss >= loss


def test_the_smallest_budget_and_one_byte_less() -> None:
    layers = [[Choice(10, 1.0), Choice(7, 2.0)], [Choice(5, 0.0)]]
    assert allocate(layers, 12 + 100, fixed=100) == [1, 0]
    with pytest.raises(SettingsError, match="111 bytes is too small") as caught:
        allocate(layers, 11 + 100, fixed=100)
    assert caught.value.hint == "the smallest possible is 112 bytes"


def test_a_larger_budget_than_all_takes_the_least_losses_and_no_useless_byte() -> None:
    layers = [[Choice(1, 3.0), Choice(2, 1.0), Choice(9, 1.0)], [Choice(4, 2.0), Choice(6, 2.5)]]
    assert allocate(layers, 10**15) == [1, 0]
    assert largest_bytes(layers) == 6


def test_many_layers_of_odd_sizes_take_a_moment() -> None:
    """A model of 560 layers whose sizes have no common unit: the coarse path, at its full size; not 0.1 % from the bound."""
    layers = [
        [Choice(1_000_003 * (layer % 7 + 1) * rate // 8, (layer % 11 + 1) * 4.0**-rate) for rate in range(1, 9)]
        for layer in range(560)
    ]
    budget = sum(choices[2].bytes for choices in layers)
    loss, size = total(layers, allocate(layers, budget))
    assert size <= budget
    assert loss < 1.001 * _lower_bound(layers, budget)


def _lower_bound(layers: list[list[Choice]], budget: int) -> float:
    """The Lagrangian bound: for any price of a byte >= 0, min of (loss + price * bytes) - price * budget is a lower bound."""
    bounds = []
    for exponent in range(400):
        price = 10.0 ** (-12 + exponent / 40)
        least = sum(min(choice.loss + price * choice.bytes for choice in choices) for choices in layers)
        bounds.append(least - price * budget)
    return max(bounds)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_refused(loss: float) -> None:
    with pytest.raises(QtipError, match="layer 1"):
        allocate([[Choice(1, 0.0)], [Choice(1, loss)]], 10)
