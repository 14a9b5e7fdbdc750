"""Tests that rounding makes one large matrix at a time, and that what is done in place gives the bits that copies give.

Oracles: the definitions, with copies, in torch; bytes of tensors that are alive (stages/live_bytes.py) in units of I^2.
"""

from __future__ import annotations

import math

import pytest
import torch

from qtipcli.quant.correction import Evidence, corrected
from qtipcli.quant.hessian import Damping, damp, factored, panels, symmetrize_
from qtipcli.quant.incoherence import random_signs, rotate_hessian, rotate_hessian_, rotate_inputs
from qtipcli.quant.matrix import RoundingSettings, round_group
from qtipcli.quant.output_side import OutputHessian, choose_damping
from qtipcli.quant.refit import _ridge_solution
from qtipcli.quant.transform import Transform
from qtipcli.stages.live_bytes import LiveBytes
from qtipcli_kernels.spec import TrellisSpec
from quant.matrices import correlated_hessian, gaussian

SPEC = TrellisSpec.at_bits("3inst", 2.0, 8)
SETTINGS = RoundingSettings(Transform(), 1e-3, refit=True)


@pytest.mark.parametrize("size", [33, 64, 130, 200, 1024])
def test_panels_cover_each_row_once(size: int) -> None:
    rows = [row for part in panels(size) for row in range(size)[part]]
    assert rows == list(range(size))
    assert len(panels(size)) == 1 or min(len(range(size)[part]) for part in panels(size)) >= 64


@pytest.mark.parametrize("size", [33, 200])
def test_a_matrix_becomes_the_mean_of_itself_and_its_transpose(size: int) -> None:
    square = gaussian(size, size)
    expected = ((square.double() + square.double().T) / 2).float()
    assert torch.equal(symmetrize_(square.clone()), expected)


@pytest.mark.parametrize("size", [16, 40, 192, 300])
@pytest.mark.parametrize("transform", ["full", "block-128"])
def test_a_hessian_is_turned_in_place_as_it_is_with_copies(size: int, transform: str) -> None:
    hessian, signs, turn = correlated_hessian(size).double(), random_signs(size, 0, "x"), Transform.parse(transform)
    expected = rotate_inputs(rotate_inputs(hessian, signs, turn).T, signs, turn).contiguous()
    assert torch.equal(rotate_hessian(hessian, signs, turn), expected)
    own = hessian.clone()
    turned = rotate_hessian_(own, signs, turn)
    assert torch.equal(turned, expected)
    assert (turned.data_ptr() == own.data_ptr()) == (size % 16 == 0)


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_a_factor_in_place_is_that_of_a_copy(shift: float) -> None:
    """shift: of the diagonal, so that the first rungs of the ladder fail."""
    hessian = correlated_hessian(150)
    hessian.diagonal().sub_(shift * hessian.diagonal().mean())
    made: list[torch.Tensor] = []

    def make() -> torch.Tensor:
        made.append(hessian.double())
        return made[-1]

    shown: list[torch.Tensor] = []
    factor, used = factored(make, 1e-3, lambda square: shown.append(square.clone()))
    whole = (hessian.double() + hessian.double().T) / 2
    whole.diagonal().add_(used.level * float(whole.diagonal().clamp(min=0).mean()))
    assert torch.equal(shown[-1], whole)
    assert torch.equal(factor, torch.linalg.cholesky_ex(whole)[0])
    assert factor.data_ptr() == made[-1].data_ptr()
    assert (used.level > 1e-3) == (shift > 0) == (len(made) > 1)
    assert damp(hessian, 1e-3).damping == used.level


def test_the_identity_stands_for_a_hessian_of_zeros() -> None:
    factor, used = factored(lambda: torch.zeros(32, 32, dtype=torch.float64), 1e-2)
    assert torch.equal(factor, torch.eye(32, dtype=torch.float64))
    assert torch.equal(used.apply_(torch.zeros(32, 32)), torch.eye(32))


def test_normal_equations_are_solved_as_torch_solves_them() -> None:
    gram, right, times = gaussian(90, 90).square_(), gaussian(90, seed=1), gaussian(90, 90, seed=2).square_()
    square = gram.double() * times.double()
    mean = square.diagonal().mean()
    square.diagonal().add_(1e-3 * mean)
    expected = torch.linalg.solve(square, right.double() + 1e-3 * mean).float()
    assert torch.equal(_ridge_solution(gram, right, 1e-3, times), expected)
    assert torch.equal(_ridge_solution(-gram, right, 1e-3), torch.ones(90))


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("shapes", [(48,), (48, 80)])
def test_what_is_used_up_gives_the_same_bits(two_sided: bool, shapes: tuple[int, ...]) -> None:
    weights = {str(number): gaussian(rows, 200, seed=number) for number, rows in enumerate(shapes)}
    outputs = {name: OutputHessian(correlated_hessian(len(weight)), 1e-2) for name, weight in weights.items()}
    specs, luts = dict.fromkeys(weights, SPEC), dict.fromkeys(weights)
    hessian = correlated_hessian(200)
    before = hessian.clone()
    kept = round_group(weights, hessian, specs, SETTINGS, luts, outputs if two_sided else None)
    assert torch.equal(hessian, before)
    assert len(weights) == len(shapes)
    given = dict(weights)
    used = round_group(given, hessian, specs, SETTINGS, luts, outputs if two_sided else None, consume=True)
    assert not given
    assert not torch.equal(hessian, before)
    for name, one in kept.items():
        other = used[name]
        for part in ("trellis", "scale_in", "scale_out"):
            assert torch.equal(getattr(one, part), getattr(other, part))
        assert (one.relative_proxy_loss, one.divergence) == (other.relative_proxy_loss, other.divergence)


LARGE = 1024


@pytest.mark.parametrize(("rows", "two_sided", "most"), [(64, False, 21.0), (64, True, 21.0), (LARGE, True, 42.0)])
def test_rounding_holds_one_float64_copy_of_a_hessian(rows: int, two_sided: bool, most: float) -> None:
    """A wide layer: its Hessian (4 I^2), float64 (8), block factor and turned Hessian in float32 (4 each). A square one adds
    the weights, as given, turned, rounded and fed back. `most` is two hundredths above what is counted; a copy of a Hessian
    more is 4 or 8."""
    weights, hessian = {"a": gaussian(rows, LARGE)}, torch.eye(LARGE).add_(0.1)
    outputs = {"a": OutputHessian(torch.eye(rows).add_(0.1), 1e-2)} if two_sided else None
    with LiveBytes() as live:
        round_group(weights, hessian, {"a": SPEC}, SETTINGS, {"a": None}, outputs, consume=True)
    assert 4 + live.peak / LARGE**2 < most


def test_choosing_an_output_side_holds_one_float64_copy() -> None:
    """Given: two in float32 (8 I^2). Made: the judge in float32 (4), one in float64 (8), its block factor in float32 (4)."""
    fitted, heldout = torch.eye(LARGE).add_(0.1), torch.eye(LARGE).add_(0.1)
    with LiveBytes() as live:
        choose_damping(fitted, heldout)
    assert live.peak / LARGE**2 < 17.5


def test_a_correction_holds_one_float64_copy() -> None:
    """Made: the Hessian in float64 (8 I^2), and what a layer of few rows adds."""
    weight, sums = gaussian(32, LARGE), torch.eye(LARGE).add_(0.1)
    seen = Evidence(sums, gaussian(32, LARGE, seed=1), 100)
    heldout = Evidence(sums / 8, gaussian(32, LARGE, seed=1) / 8, 12)
    with LiveBytes() as live:
        assert corrected(weight, seen, heldout)[1] < math.inf
    assert live.peak / LARGE**2 < 10.0


def test_damping_in_place_is_damping_in_float64() -> None:
    hessian = correlated_hessian(100)
    used = Damping(1e-2, 1e-2, 0.5, 0)
    expected = (hessian.double() + hessian.double().T) / 2
    expected.diagonal().add_(1e-2 * 0.5)
    assert torch.equal(used.apply_(hessian.clone()), expected.float())
