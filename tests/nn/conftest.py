"""Counts the products that packed layers take."""

import pytest

from qtipcli.nn import linear
from qtipcli_kernels import dispatch


@pytest.fixture
def products(monkeypatch):
    """Output features of each product taken."""
    taken = []

    def matvec(x, trellis, spec, lut=None):
        taken.append(len(trellis) * 16)
        return dispatch_matvec(x, trellis, spec, lut)

    dispatch_matvec = dispatch.matvec
    monkeypatch.setattr(linear.dispatch, "matvec", matvec)
    return taken
