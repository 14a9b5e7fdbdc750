"""The cheap rounding that stands for the real one.

Oracles: the real rounding (matrix.round_group) of the same layers; the published errors of the codes.
"""

from __future__ import annotations

import pytest
import torch

from qtipcli.quant.matrix import RoundingSettings, round_group
from qtipcli.quant.probe import probe_group, small_trellis, trellis_gain
from qtipcli.quant.transform import Transform
from qtipcli_kernels.codes import default_lut
from qtipcli_kernels.spec import TrellisSpec
from quant.matrices import correlated_hessian, gaussian, proxy_loss

SETTINGS = RoundingSettings(Transform(), 1e-3, refit=True)
NOISE = TrellisSpec("3inst", 2, 10)
CANDIDATES = [NOISE, TrellisSpec("hyb2", 5, 10)]


def test_losses_are_those_of_the_real_rounding() -> None:
    """With 4 and 16 times as many states, and four times as many rows in one layer.

    Within 20 %: one rounding differs from another by 5 %, and the gain of more states is that of Gaussian weights, not of
    weights with fed-back errors. Without it these figures would be 11 to 40 % off, all to the same side.
    """
    weights = {"a": gaussian(512, 64), "b": gaussian(96, 64, seed=1)}
    hessian = correlated_hessian(64)
    candidates = [TrellisSpec("3inst", 2, 12), TrellisSpec("3inst", 4, 14)]
    probes = probe_group(weights, hessian, candidates[0], candidates, SETTINGS)
    for spec in candidates:
        real = round_group(weights, hessian, dict.fromkeys(weights, spec), SETTINGS, dict.fromkeys(weights, default_lut(spec)))
        for name, matrix in real.items():
            assert probes[name].losses[spec] == pytest.approx(matrix.relative_proxy_loss, rel=0.2)


def test_the_noisy_layer_is_a_rounded_one_with_the_loss_that_it_says() -> None:
    weights, hessian = {"a": gaussian(80, 48)}, correlated_hessian(48)
    probe = probe_group(weights, hessian, NOISE, [], SETTINGS)["a"]
    damped = hessian + 1e-3 * hessian.diagonal().mean() * torch.eye(48)
    relative = proxy_loss(weights["a"], probe.noisy_OI, damped) / proxy_loss(weights["a"], torch.zeros(80, 48), damped)
    assert probe.noise_loss == pytest.approx(relative, rel=1e-4)  # float32 sums against float64
    assert probe.noisy_OI.shape == (80, 48)
    assert not torch.equal(probe.noisy_OI, weights["a"])


def test_the_refit_is_in_the_probe() -> None:
    """One input a thousand times as strong as the others: there the refit takes half of the error away, as it does for real."""
    weights, hessian = {"a": gaussian(64, 64)}, torch.diag(torch.cat([torch.tensor([1e6]), torch.ones(63)]))
    with_refit, without = (
        probe_group(weights, hessian, NOISE, [NOISE], RoundingSettings(Transform(), 1e-3, refit=refit))["a"]
        for refit in (True, False)
    )
    assert with_refit.losses[NOISE] < 0.8 * without.losses[NOISE]
    assert with_refit.noise_loss < 0.8 * without.noise_loss


def test_the_same_arguments_give_the_same_bits() -> None:
    weights, hessian = {"a": gaussian(32, 32)}, correlated_hessian(32)
    first, second = (probe_group(weights, hessian, NOISE, CANDIDATES, SETTINGS)["a"] for _ in range(2))
    assert torch.equal(first.noisy_OI, second.noisy_OI)
    assert first.losses == second.losses


def test_zero_weights_have_no_loss() -> None:
    probe = probe_group({"a": torch.zeros(32, 32)}, correlated_hessian(32), NOISE, CANDIDATES, SETTINGS)["a"]
    assert not probe.noisy_OI.any()
    assert probe.noise_loss == 0.0
    assert set(probe.losses.values()) == {0.0}


def test_what_the_larger_trellis_gains() -> None:
    """More states are never worse, gain more at higher rates (method.md, section 3), and as many gain nothing."""
    assert trellis_gain(TrellisSpec("3inst", 2, 10)) == 1.0
    assert trellis_gain(TrellisSpec("3inst", 4, 14)) < trellis_gain(TrellisSpec("3inst", 4, 12)) < 1.0
    assert trellis_gain(TrellisSpec("3inst", 4, 12)) < trellis_gain(TrellisSpec("3inst", 2, 12)) < 1.0
    assert small_trellis(TrellisSpec("3inst", 2, 16)).state_bits == 10
    assert small_trellis(TrellisSpec("3inst", 2, 8)).state_bits == 8
