"""Whether held-out text wants an output Hessian, and how damped. Oracles: rounding noise that is drawn; rounding itself."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from qtipcli.quant.hessian import damp
from qtipcli.quant.matrix import RoundingSettings, round_group
from qtipcli.quant.output_side import DAMPINGS, OutputHessian, choose_damping
from qtipcli.quant.transform import Transform
from qtipcli_kernels.spec import TrellisSpec
from quant.matrices import correlated_hessian, gaussian

SPEC = TrellisSpec("3inst", 2, 8)
SETTINGS = RoundingSettings(Transform(), damping=1e-3, refit=True, search=False)


def test_a_hessian_that_held_out_text_confirms_is_used() -> None:
    hessian = correlated_hessian(48)
    damping, ratio = choose_damping(hessian, hessian)
    assert damping == min(DAMPINGS)
    assert ratio < 0.7


def test_one_that_held_out_text_contradicts_is_not() -> None:
    few = gaussian(4, 48)
    damping, ratio = choose_damping(few.T @ few / 4, torch.eye(48))
    assert damping == math.inf
    assert ratio == 1.0


def test_the_fewer_samples_the_more_damping() -> None:
    directions = gaussian(48, 48) * torch.logspace(0, -0.5, 48)
    many = gaussian(5000, 48, seed=2) @ directions.T
    chosen = []
    for samples in (20, 60, 5000):
        few = gaussian(samples, 48, seed=1) @ directions.T
        chosen.append(choose_damping(few.T @ few / samples, many.T @ many / 5000)[0])
    assert chosen == [1.0, 0.1, 0.01]


def test_no_gradients_at_all_are_no_help() -> None:
    assert choose_damping(torch.zeros(32, 32), torch.zeros(32, 32)) == (math.inf, 1.0)


def test_an_infinite_damping_leaves_the_mean_of_the_diagonal() -> None:
    output = OutputHessian(correlated_hessian(32), math.inf)
    mean = float(correlated_hessian(32).diagonal().mean())
    torch.testing.assert_close(output.metric(output.damped()), mean * torch.eye(32), rtol=1e-6, atol=0)


def both_losses(outputs: dict[str, OutputHessian] | None) -> tuple[float, float]:
    """(the stored matrix's tr(H_out E H E^T) / 2 as reported; its relative proxy loss), without the refit."""
    settings = replace(SETTINGS, refit=False, search=True)  # the refit weighs outputs as well
    fine = replace(SPEC, bits_per_step=4)
    matrix = round_group({"a": gaussian(64, 48)}, correlated_hessian(48), {"a": fine}, settings, {"a": None}, outputs)["a"]
    return matrix.divergence, matrix.relative_proxy_loss


def test_two_sided_rounding_lowers_what_it_weighs() -> None:
    """By what feedback does to white rounding noise, which that of a fine code nearly is: .31, and .37 is found."""
    hessian = correlated_hessian(64, seed=5)
    two_sided, proxy = both_losses({"a": OutputHessian(hessian, 1e-2)})
    one_sided, plain_proxy = both_losses({"a": OutputHessian(hessian, math.inf)})
    assert two_sided < 1.25 * choose_damping(hessian, hessian)[1] * one_sided
    assert plain_proxy < proxy


def test_without_outputs_there_is_no_divergence_to_report() -> None:
    assert both_losses(None)[0] is None


@pytest.mark.parametrize("refit", [True, False])
def test_the_divergence_is_that_of_the_stored_matrix(refit: bool) -> None:
    weight, hessian, output = 0.1 * gaussian(40, 37), correlated_hessian(37), correlated_hessian(40, seed=2)
    settings = replace(SETTINGS, refit=refit)
    outputs = {"a": OutputHessian(output, 1e-2)}
    matrix = round_group({"a": weight}, hessian, {"a": SPEC}, settings, {"a": None}, outputs)["a"]
    from quant.test_matrix import stored

    error = (weight - stored(matrix, (40, 37), Transform())).double()
    damped = damp(hessian, settings.damping).hessian_II
    expected = 0.5 * float(((output.double() @ error @ damped) * error).sum())
    assert matrix.divergence == pytest.approx(expected, rel=1e-3)
