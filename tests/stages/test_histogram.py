"""The histogram of a divergence. Oracle: each value looked for bin by bin, and the whole count."""

from __future__ import annotations

import json

import numpy as np

from qtipcli.stages.histogram import histogram_of


def test_every_value_is_counted_once_in_the_bin_that_holds_it():
    random = np.random.default_rng(0)
    values = np.concatenate([10 ** random.uniform(-11, 3, 2000), [0.0, -1e-17, 1e-9, 1.0, 100.0]]).reshape(5, -1)
    found = histogram_of(values)
    bins = list(zip(found.edges, found.edges[1:], strict=False))
    assert len(bins) == len(found.counts)
    for (start, end), count in zip(bins, found.counts, strict=True):
        assert count == sum(start <= value < end for value in values.ravel())
    assert found.below == (values < found.edges[0]).sum() and found.above == (values >= found.edges[-1]).sum()
    assert found.below + sum(found.counts) + found.above == values.size
    assert {1e-9, 1.0, 100.0} <= set(found.edges)
    assert json.loads(json.dumps(found.as_json())) == found.as_json()
