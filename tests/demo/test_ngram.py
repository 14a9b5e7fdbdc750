"""The 3-gram byte baseline against its definition, written out by brute force on a tiny alphabet."""

from itertools import product

import numpy as np
import pytest

from qtipcli.demo.ngram import DISCOUNTS, ByteTrigram

SYMBOLS = 3
TEXT = bytes(np.random.default_rng(0).choice(SYMBOLS, size=40, p=[0.7, 0.25, 0.05]).astype(np.uint8))


def kneser_ney(context: tuple[int, ...], symbol: int, discount: float) -> float:
    """Interpolated Kneser-Ney from the set of 3-grams of TEXT, by recursion over the order, with no arrays."""
    trigrams = [TEXT[i : i + 3] for i in range(len(TEXT) - 2)]
    # Highest order: all occurrences. Lower orders: in how many distinct longer contexts.
    grams = trigrams if len(context) == 2 else [g[1:] for g in set(trigrams)]
    if len(context) == 0:
        grams = [g[1:] for g in set(grams)]
    lower = kneser_ney(context[1:], symbol, discount) if context else 1 / SYMBOLS
    seen = [g[-1] for g in grams if tuple(g[:-1]) == context]
    if not seen:
        return lower
    return max(seen.count(symbol) - discount, 0) / len(seen) + discount * len(set(seen)) / len(seen) * lower


@pytest.mark.parametrize("discount", [0.05, 0.5, 0.9])
def test_probabilities_are_interpolated_kneser_ney(discount):
    model = ByteTrigram.fit(TEXT, SYMBOLS)
    expected = [kneser_ney((a, b), c, discount) for a, b, c in product(range(SYMBOLS), repeat=3)]
    # Float64, a dozen operations a value: a few roundings.
    np.testing.assert_allclose(model.probabilities(discount).ravel(), expected, rtol=1e-13)


@pytest.mark.parametrize("discount", DISCOUNTS)
def test_probabilities_sum_to_one_and_none_is_zero_even_after_unseen_pairs(discount):
    probability_ABC = ByteTrigram.fit(b"abracadabra" * 3).probabilities(discount)
    # 256 float64 terms that sum to 1: at most 256 roundings of 1.1e-16.
    np.testing.assert_allclose(probability_ABC.sum(axis=-1), 1.0, rtol=0, atol=3e-14)
    assert probability_ABC.min() > 0


def test_bits_per_byte_is_the_mean_code_length_under_the_best_discount():
    model = ByteTrigram.fit(TEXT, SYMBOLS)
    other = bytes([0, 1, 1, 2, 0, 0, 1])
    by_discount = [
        -np.mean([np.log2(kneser_ney((other[i - 2], other[i - 1]), other[i], d)) for i in range(2, len(other))])
        for d in DISCOUNTS
    ]
    assert model.bits_per_byte(other) == pytest.approx(min(by_discount), rel=1e-12)


def test_a_text_of_one_repeated_cycle_costs_almost_nothing():
    # The known answer: every pair has one continuation, so only the discounted mass is lost, 0.02 of a thousand counts.
    cycle = bytes(range(10)) * 1000
    assert ByteTrigram.fit(cycle).bits_per_byte(cycle) < 1e-4
