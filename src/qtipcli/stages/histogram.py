"""Owns the histogram of a divergence: fixed bins on a log scale, so that those of two models can be laid over each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

BINS_A_DECADE = 4
FIRST_DECADE, LAST_DECADE = -9, 2
"""From a divergence that float32 logits cannot resolve to one beyond what any token of a working model has."""


@dataclass(frozen=True)
class Histogram:
    """Counts of values on a log scale.

    Attributes:
        edges: of the bins, ascending, one more than there are counts; powers of ten are among them.
        counts: values v with edges[i] <= v < edges[i + 1].
        below, above: values less than the first edge, zero and rounding's negatives among them; values from the last one on.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    below: int
    above: int

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"edges": list(self.edges), "counts": list(self.counts), "below": self.below, "above": self.above}


def histogram_of(values: np.ndarray) -> Histogram:
    """The histogram of all of `values`, finite floats of any shape."""
    bins = (LAST_DECADE - FIRST_DECADE) * BINS_A_DECADE
    edges = [10 ** (FIRST_DECADE + index / BINS_A_DECADE) for index in range(bins + 1)]
    place = np.searchsorted(edges, values.ravel(), side="right")
    count = np.bincount(place, minlength=bins + 2)
    return Histogram(tuple(edges), tuple(int(each) for each in count[1:-1]), int(count[0]), int(count[-1]))
