"""The closed-form scales. Oracle: ordinary least squares (`torch.linalg.lstsq`) on outputs, in float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from qtipcli.quant.refit import refit_columns, refit_rows, refit_scales
from quant.matrices import correlated_hessian, gaussian, proxy_loss

WEIGHT = gaussian(24, 32)
ROUNDED = 0.9 * WEIGHT + 0.3 * gaussian(24, 32, seed=1)
INPUTS = gaussian(200, 32, seed=2) @ gaussian(32, 32, seed=3)
HESSIAN = INPUTS.T @ INPUTS / 200


def test_row_scales_are_those_of_least_squares_on_each_output() -> None:
    expected = [
        float(torch.linalg.lstsq((INPUTS @ quantized).double()[:, None], (INPUTS @ row).double()[:, None]).solution)
        for row, quantized in zip(WEIGHT, ROUNDED, strict=True)
    ]
    torch.testing.assert_close(refit_rows(WEIGHT, ROUNDED, HESSIAN), torch.tensor(expected), rtol=1e-4, atol=0)


def test_column_scales_are_those_of_least_squares_on_all_outputs() -> None:
    # y[n, o] = sum over i of (x[n, i] Q[o, i]) r[i]
    design = (INPUTS[:, None, :] * ROUNDED[None]).double().reshape(-1, 32)
    target = (INPUTS @ WEIGHT.T).double().reshape(-1, 1)
    expected = torch.linalg.lstsq(design, target).solution[:, 0].float()
    torch.testing.assert_close(refit_columns(WEIGHT, ROUNDED, HESSIAN), expected, rtol=1e-3, atol=1e-4)


OUTPUTS = [gaussian(8, 8, seed=4), gaussian(16, 16, seed=5)]
OUTPUT_HESSIANS = [root @ root.T for root in OUTPUTS]


def test_coupled_row_scales_are_those_of_least_squares_behind_the_outputs() -> None:
    # |root^T (W - diag(c) Q) x|^2 summed over x and layers; each layer's design has one column for each of its rows.
    expected = []
    for part, root in ((slice(0, 8), OUTPUTS[0]), (slice(8, 24), OUTPUTS[1])):
        design = torch.einsum("ok,on->nko", root, ROUNDED[part] @ INPUTS.T).reshape(-1, len(root)).double()
        target = torch.einsum("ok,on->nk", root, WEIGHT[part] @ INPUTS.T).reshape(-1, 1).double()
        expected.append(torch.linalg.lstsq(design, target).solution[:, 0])
    found = refit_rows(WEIGHT, ROUNDED, HESSIAN, OUTPUT_HESSIANS)
    # The ridge moves the solution by its own size where the Hessian says little.
    torch.testing.assert_close(found, torch.cat(expected).float(), rtol=2e-2, atol=2e-2)


def test_column_scales_behind_outputs_are_those_of_least_squares() -> None:
    designs, targets = [], []
    for part, root in ((slice(0, 8), OUTPUTS[0]), (slice(8, 24), OUTPUTS[1])):
        designs.append(torch.einsum("ok,oi,ni->nki", root, ROUNDED[part], INPUTS).reshape(-1, 32).double())
        targets.append(torch.einsum("ok,on->nk", root, WEIGHT[part] @ INPUTS.T).reshape(-1, 1).double())
    expected = torch.linalg.lstsq(torch.cat(designs), torch.cat(targets)).solution[:, 0].float()
    found = refit_columns(WEIGHT, ROUNDED, HESSIAN, OUTPUT_HESSIANS)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_identities_on_the_output_side_change_nothing() -> None:
    plain = refit_scales(WEIGHT, ROUNDED, HESSIAN)
    with_identities = refit_scales(WEIGHT, ROUNDED, HESSIAN, outputs=[torch.eye(8), torch.eye(16)])
    for found, expected in zip(with_identities, plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_the_refit_never_raises_the_loss(seed: int) -> None:
    weight, hessian = gaussian(40, 48, seed=seed), correlated_hessian(48, seed=seed)
    rounded = weight + 0.3 * gaussian(40, 48, seed=seed + 10)
    losses = [proxy_loss(weight, rounded, hessian)]
    for rounds in (0, 1, 2, 3):
        rows, columns = refit_scales(weight, rounded, hessian, rounds)
        losses.append(proxy_loss(weight, rows[:, None] * rounded * columns, hessian))
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(losses))
    assert losses[-1] < 0.97 * losses[0]


def test_what_is_right_already_stays() -> None:
    rows, columns = refit_scales(WEIGHT, WEIGHT, HESSIAN)
    torch.testing.assert_close(rows[:, None] * columns, torch.ones(24, 32), rtol=1e-4, atol=0)


def test_dead_inputs_and_zero_rows_keep_their_scale() -> None:
    hessian = correlated_hessian(32, dead=(5,))
    rounded = ROUNDED.clone()
    rounded[7] = 0.0
    rows, columns = refit_scales(WEIGHT, rounded, hessian)
    assert rows[7] == 1.0
    assert float(columns[5]) == pytest.approx(1.0, abs=1e-4)
    assert torch.isfinite(rows).all()
    assert torch.isfinite(columns).all()


def test_nothing_to_fit_leaves_ones() -> None:
    for rounded, hessian in ((torch.zeros(24, 32), HESSIAN), (ROUNDED, torch.zeros(32, 32))):
        rows, columns = refit_scales(WEIGHT, rounded, hessian)
        assert torch.equal(rows, torch.ones(24))
        assert torch.equal(columns, torch.ones(32))
