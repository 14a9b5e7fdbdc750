"""Owns the baseline that the demo model must beat: an interpolated Kneser-Ney 3-gram model over bytes."""

from dataclasses import dataclass

import numpy as np

# The discounts that `bits_per_byte` tries; it reports the best on the very text it measures, which favours the baseline.
DISCOUNTS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class ByteTrigram:
    """Counts of the training text, and the probabilities that follow from them.

    counts: int64 [S, S, S] over (A, B, C), how often symbol C follows the pair A, B. S is the
    number of symbols, 256 for bytes.
    """

    counts: np.ndarray

    @classmethod
    def fit(cls, text: bytes, symbols: int = 256) -> "ByteTrigram":
        """Count the 3-grams of `text`, whose bytes are all below `symbols`."""
        code = np.frombuffer(text, dtype=np.uint8).astype(np.int64)
        trigram = (code[:-2] * symbols + code[1:-1]) * symbols + code[2:]
        return cls(np.bincount(trigram, minlength=symbols**3).reshape(symbols, symbols, symbols))

    def probabilities(self, discount: float) -> np.ndarray:
        """P(C | A, B), float64 [S, S, S], positive and summing to 1 over C for every pair, seen or not.

        Interpolated Kneser-Ney (Chen and Goodman 1998, section 2.7) with one absolute discount, 0 < discount < 1: each order
        gives `discount` of every distinct continuation it has seen to the order below, the lower orders count in how many
        distinct contexts a symbol was seen, and the lowest is uniform over the symbols.
        """
        count_BC = (self.counts > 0).sum(axis=0)
        count_C = (count_BC > 0).sum(axis=0)
        symbols = len(count_C)
        unigram_C = _interpolate(count_C, np.full(symbols, 1 / symbols), discount)
        bigram_BC = _interpolate(count_BC, unigram_C, discount)
        return _interpolate(self.counts, bigram_BC, discount)

    def bits_per_byte(self, text: bytes) -> float:
        """Bits per byte of `text` from its third byte on, with the discount of DISCOUNTS that is best on this text."""
        code = np.frombuffer(text, dtype=np.uint8)
        symbols = code[:-2], code[1:-1], code[2:]
        return min(float(-np.log2(self.probabilities(discount)[symbols]).mean()) for discount in DISCOUNTS)


def _interpolate(count: np.ndarray, lower: np.ndarray, discount: float) -> np.ndarray:
    """Discounted relative frequencies over the last axis, the mass taken away spread as `lower` says; `lower` where unseen."""
    total = count.sum(axis=-1, keepdims=True)
    seen = np.maximum(total, 1)
    left_over = np.where(total > 0, discount * (count > 0).sum(axis=-1, keepdims=True) / seen, 1.0)
    return np.maximum(count - discount, 0) / seen + left_over * lower
