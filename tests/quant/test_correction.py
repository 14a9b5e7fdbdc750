"""The correction of a matrix for a changed input. Oracle: ridge regression on the samples themselves, in float64."""

from __future__ import annotations

import math

import torch

from qtipcli.quant.correction import DAMPINGS, Evidence, corrected
from quant.matrices import gaussian

WEIGHT = gaussian(8, 32)
TOKENS = 500
OLD = gaussian(TOKENS, 32, seed=1) @ gaussian(32, 32, seed=2)
NEW = OLD + 0.3 * gaussian(TOKENS, 32, seed=3)
ADDED = gaussian(TOKENS, 8, seed=4) + OLD[:, :8]
MISSING = OLD @ WEIGHT.T + ADDED - NEW @ WEIGHT.T


def evidence(x_NI: torch.Tensor, missing_NO: torch.Tensor) -> tuple[Evidence, Evidence]:
    """Of all tokens, and of the last fifth."""
    held = slice(-len(x_NI) // 5, None)
    return tuple(
        Evidence(x_NI[part].T @ x_NI[part], missing_NO[part].T @ x_NI[part], len(x_NI[part])) for part in (slice(None), held)
    )  # type: ignore[return-value]


def test_it_is_ridge_regression_of_the_old_outputs_on_the_new_input() -> None:
    found, damping = corrected(WEIGHT, *evidence(NEW, MISSING))
    assert damping == DAMPINGS[0]
    target = (OLD @ WEIGHT.T + ADDED).double()
    pull = (damping * (NEW.T @ NEW).diagonal().mean()).double().sqrt()
    design = torch.cat([NEW.double(), pull * torch.eye(32, dtype=torch.float64)])
    wanted = torch.cat([target, pull * WEIGHT.T.double()])
    expected = torch.linalg.lstsq(design, wanted).solution.T.float()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_what_held_out_tokens_do_not_confirm_is_not_done() -> None:
    """Fewer tokens than inputs, and nothing to find: every correction fits noise."""
    x_NI, noise_NO = gaussian(30, 32, seed=5), gaussian(30, 8, seed=6)
    found, damping = corrected(WEIGHT, *evidence(x_NI, noise_NO))
    assert damping == math.inf
    assert torch.equal(found, WEIGHT)


def test_little_text_asks_for_more_damping() -> None:
    x_NI = gaussian(36, 32, seed=5)
    missing_NO = x_NI @ (0.3 * gaussian(32, 8, seed=7)) + gaussian(36, 8, seed=8)
    _, damping = corrected(WEIGHT, *evidence(x_NI, missing_NO))
    assert DAMPINGS[0] < damping < math.inf


def test_without_held_out_tokens_nothing_is_corrected() -> None:
    seen, _ = evidence(NEW, MISSING)
    nothing = Evidence(torch.zeros_like(seen.hessian_II), torch.zeros_like(seen.missing_OI), 0)
    assert corrected(WEIGHT, seen, nothing)[1] == math.inf


def test_an_input_that_is_always_zero_keeps_its_weights() -> None:
    dead_NI = NEW.clone()
    dead_NI[:, 5] = 0.0
    found, damping = corrected(WEIGHT, *evidence(dead_NI, MISSING))
    assert math.isfinite(damping)
    assert torch.isfinite(found).all()
    assert torch.equal(found[:, 5], WEIGHT[:, 5])


def test_a_correction_that_float32_cannot_hold_is_not_done() -> None:
    found, damping = corrected(WEIGHT, *evidence(NEW, 1e20 * MISSING))
    assert torch.equal(found, WEIGHT)
    assert damping == math.inf
