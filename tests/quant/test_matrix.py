"""Rounding groups of layers, and the search for the scale.

Oracles: what `TrellisLinear` computes from the stored tensors; a dense grid of ratios rounded one by one.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qtipcli.nn.layout import PackedLayout
from qtipcli.nn.linear import TrellisLinear
from qtipcli.quant.hessian import damp
from qtipcli.quant.incoherence import random_signs
from qtipcli.quant.ldlq import block_ldl, relative_proxy_loss, round_ldlq
from qtipcli.quant.matrix import PackedMatrix, RoundingSettings, round_group
from qtipcli.quant.scale import rms, search_scale, source_scale, tile_rounder
from qtipcli.quant.transform import Transform
from qtipcli_kernels.codes import tabulate
from qtipcli_kernels.spec import TrellisSpec
from quant.matrices import correlated_hessian, gaussian

SPEC = TrellisSpec("3inst", 2, 8)
PLAIN = RoundingSettings(Transform(), damping=1e-3, refit=True, search=False)


def round_all(weights: dict[str, torch.Tensor], hessian: torch.Tensor, settings: RoundingSettings, spec: TrellisSpec = SPEC):
    return round_group(weights, hessian, dict.fromkeys(weights, spec), settings, dict.fromkeys(weights))


def stored(matrix: PackedMatrix, size: tuple[int, int], transform: Transform, spec: TrellisSpec = SPEC) -> torch.Tensor:
    """The dense matrix that a layer with these tensors stands for."""
    layer = TrellisLinear(PackedLayout(size[1], size[0], spec, transform, transform))
    for part in ("trellis", "scale_in", "scale_out"):
        assert getattr(layer, part).shape == getattr(matrix, part).shape
        assert getattr(layer, part).dtype == getattr(matrix, part).dtype
        getattr(layer, part).data = getattr(matrix, part)
    return layer.weight_dense()


@pytest.mark.parametrize("transform", [Transform(), Transform("block", 128), Transform("block", 16)], ids=str)
@pytest.mark.parametrize("size", [(64, 64), (100, 37), (256, 128)])
@pytest.mark.parametrize("refit", [True, False])
def test_what_is_stored_is_what_is_reported(size: tuple[int, int], transform: Transform, refit: bool) -> None:
    weight, hessian = 0.02 * gaussian(*size), correlated_hessian(size[1])
    settings = replace(PLAIN, transform=transform, refit=refit)
    matrix = round_all({"layer": weight}, hessian, settings)["layer"]
    dense = stored(matrix, size, transform)
    damped = damp(hessian, settings.damping).hessian_II
    assert relative_proxy_loss(weight, dense, damped) == pytest.approx(matrix.relative_proxy_loss, rel=1e-3)
    assert matrix.relative_proxy_loss < 0.12  # far below the 0.12 of a scalar quantizer
    assert matrix.damping == settings.damping
    if refit:
        assert matrix.relative_proxy_loss < matrix.unrefitted_loss
    else:
        assert matrix.relative_proxy_loss == pytest.approx(matrix.unrefitted_loss, rel=1e-2)


def test_a_group_shares_its_input_side() -> None:
    weights = {"q": gaussian(64, 48), "k": gaussian(32, 48, seed=1), "v": gaussian(37, 48, seed=2)}
    specs = {"q": SPEC, "k": SPEC, "v": TrellisSpec("3inst", 4, 8)}
    group = round_group(weights, correlated_hessian(48), specs, PLAIN, dict.fromkeys(weights))
    assert torch.equal(group["q"].scale_in, group["k"].scale_in)
    assert torch.equal(group["q"].scale_in, group["v"].scale_in)
    assert torch.equal(group["q"].scale_in.sign().float(), random_signs(48, 0, "q.in"))
    assert group["v"].trellis.numel() * 64 == group["q"].trellis.numel() * 2 * 48
    assert group["v"].relative_proxy_loss < 0.3 * group["k"].relative_proxy_loss


def test_the_same_arguments_give_the_same_bits_whatever_came_before() -> None:
    weights, hessian = {"a": gaussian(64, 64), "b": gaussian(32, 64, seed=1)}, correlated_hessian(64)
    settings = replace(PLAIN, search=True)
    first = round_all(weights, hessian, settings)
    torch.manual_seed(5)
    round_all({"c": gaussian(16, 16)}, correlated_hessian(16), settings)
    second = round_all(weights, hessian, settings)
    for name in weights:
        for part in ("trellis", "scale_in", "scale_out"):
            assert torch.equal(getattr(first[name], part), getattr(second[name], part))
        assert first[name].relative_proxy_loss == second[name].relative_proxy_loss
    other = round_all(weights, hessian, replace(settings, seed=1))
    assert not torch.equal(first["a"].trellis, other["a"].trellis)


def test_arguments_are_left_as_they_were() -> None:
    weight, hessian = gaussian(32, 32), correlated_hessian(32)
    kept = weight.clone(), hessian.clone()
    round_all({"layer": weight}, hessian, PLAIN)
    assert torch.equal(weight, kept[0])
    assert torch.equal(hessian, kept[1])


@pytest.mark.parametrize("search", [True, False])
def test_weights_of_zero_stay_zero(search: bool) -> None:
    weights = {"zero": torch.zeros(32, 64), "other": gaussian(32, 64)}
    group = round_all(weights, correlated_hessian(64), replace(PLAIN, search=search))
    assert not stored(group["zero"], (32, 64), Transform()).any()
    assert group["zero"].relative_proxy_loss == 0.0
    assert group["other"].relative_proxy_loss < 0.12


def test_dead_inputs_are_reported_and_harmless() -> None:
    weight, hessian = gaussian(64, 64), correlated_hessian(64, dead=(0, 33))
    matrix = round_all({"layer": weight}, hessian, PLAIN)["layer"]
    assert matrix.dead_inputs == 2
    assert torch.isfinite(matrix.scale_in).all()
    assert matrix.relative_proxy_loss < 0.12


def test_a_hessian_of_zeros_rounds_as_the_identity() -> None:
    weight = gaussian(64, 64)
    nothing, identity = (
        round_all({"layer": weight}, hessian, replace(PLAIN, damping=0.0))["layer"]
        for hessian in (torch.zeros(64, 64), torch.eye(64))
    )
    assert torch.equal(nothing.trellis, identity.trellis)
    assert nothing.dead_inputs == 64


def test_a_climbed_ladder_is_reported() -> None:
    direction = torch.nn.functional.normalize(gaussian(64, 1), dim=0)
    hessian = correlated_hessian(64)
    hessian -= hessian.diagonal().mean() * direction @ direction.T
    matrix = round_all({"layer": gaussian(32, 64)}, hessian, PLAIN)["layer"]
    assert matrix.damping > PLAIN.damping
    assert torch.isfinite(torch.tensor(matrix.relative_proxy_loss))


def test_half_precision_weights_are_rounded_as_their_values() -> None:
    weight = gaussian(32, 32).to(torch.bfloat16)
    half, full = (round_all({"layer": each}, correlated_hessian(32), PLAIN)["layer"] for each in (weight, weight.float()))
    assert torch.equal(half.trellis, full.trellis)


@pytest.mark.parametrize("bits", [2, 4])
def test_the_search_finds_nearly_the_best_ratio(bits: int) -> None:
    spec = TrellisSpec("3inst", bits, 10)
    weight, hessian = gaussian(128, 128), correlated_hessian(128)
    damped = damp(hessian, 1e-3)
    lower = block_ldl(damped.cholesky_II).float()
    table = tabulate(spec)

    def loss(ratio: float) -> float:
        step_size = rms(weight) / (ratio * rms(table))
        _, rounded = round_ldlq(weight / step_size, lower, tile_rounder(spec, table))
        return relative_proxy_loss(weight, rounded * step_size, damped.hessian_II)

    found = search_scale(weight, lower, damped.hessian_II.float(), spec, None)
    grid = [loss(factor / 100 * source_scale(spec)) for factor in range(60, 121, 5)]
    assert loss(found) < 1.05 * min(grid)
    assert search_scale(weight, lower, damped.hessian_II.float(), spec, None) == found
