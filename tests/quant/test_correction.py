"""The correction of a matrix for a changed input. Oracle: ridge regression on the samples themselves, in float64."""

from __future__ import annotations

import torch

from qtipcli.quant.correction import CORRECTION_DAMPING, corrected
from quant.matrices import gaussian

WEIGHT = gaussian(8, 32)
OLD = gaussian(500, 32, seed=1) @ gaussian(32, 32, seed=2)
NEW = OLD + 0.3 * gaussian(500, 32, seed=3)
ADDED = gaussian(500, 8, seed=4) + OLD[:, :8]


def moments(missing_NO: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return NEW.T @ NEW / 500, missing_NO.T @ NEW / 500


def test_it_is_ridge_regression_of_the_old_outputs_on_the_new_input() -> None:
    target = (OLD @ WEIGHT.T + ADDED).double()
    hessian, missing = moments(OLD @ WEIGHT.T + ADDED - NEW @ WEIGHT.T)
    pull = (500 * CORRECTION_DAMPING * hessian.diagonal().mean()).double().sqrt()
    design = torch.cat([NEW.double(), pull * torch.eye(32, dtype=torch.float64)])
    wanted = torch.cat([target, pull * WEIGHT.T.double()])
    expected = torch.linalg.lstsq(design, wanted).solution.T.float()
    torch.testing.assert_close(corrected(WEIGHT, hessian, missing), expected, rtol=1e-3, atol=1e-4)


def test_nothing_missing_changes_nothing() -> None:
    hessian, missing = moments(torch.zeros(500, 8))
    assert torch.equal(corrected(WEIGHT, hessian, missing), WEIGHT)


def test_an_input_that_is_always_zero_keeps_its_weights() -> None:
    hessian, missing = moments(ADDED)
    hessian[5], hessian[:, 5], missing[:, 5] = 0.0, 0.0, 0.0
    found = corrected(WEIGHT, hessian, missing)
    assert torch.isfinite(found).all()
    assert torch.equal(found[:, 5], WEIGHT[:, 5])
