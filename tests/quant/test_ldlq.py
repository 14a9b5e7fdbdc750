"""The block factorisation, LDLQ and the damping ladder.

Oracles: H itself; a loop over block columns written from the formula of QuIP# section 4; for a Hessian on each side a loop over
tiles; rounding without feedback.
"""

from __future__ import annotations

import pytest
import torch

from qtipcli.quant.hessian import damp
from qtipcli.quant.ldlq import block_ldl, relative_proxy_loss, round_ldlq, round_two_sided
from qtipcli.quant.scale import tile_rounder
from qtipcli_kernels.codes import tabulate
from qtipcli_kernels.packing import matrix_from_tiles
from qtipcli_kernels.spec import TILE, TrellisSpec
from quant.matrices import correlated_hessian, gaussian, proxy_loss

SPEC = TrellisSpec("3inst", 2, 8)


def to_integers(tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A rounder that any loop can repeat: nearest integers, which stand for the states as well."""
    return tiles.round().to(torch.int32), tiles.round()


def trellis(tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return tile_rounder(SPEC, tabulate(SPEC))(tiles)


def test_the_block_factor_gives_the_hessian_back() -> None:
    damped = damp(correlated_hessian(80), 1e-2)
    lower = block_ldl(damped.cholesky_II)
    assert lower.dtype == torch.float64
    diagonal = torch.zeros_like(lower)
    for start in range(0, 80, TILE):
        block = slice(start, start + TILE)
        assert torch.equal(lower[block, block], torch.eye(TILE, dtype=torch.float64))
        assert not lower[block, start + TILE :].any()
        corner = damped.cholesky_II[block, block]
        diagonal[block, block] = corner @ corner.T
    torch.testing.assert_close(lower @ diagonal @ lower.T, damped.hessian_II, rtol=1e-10, atol=1e-12)


def test_ldlq_is_the_loop_of_its_formula() -> None:
    weight = gaussian(32, 64) * 5
    lower = block_ldl(damp(correlated_hessian(64), 1e-2).cholesky_II).float()
    states, rounded = round_ldlq(weight, lower, to_integers)
    expected = torch.zeros(32, 64)
    for row in range(32):
        for block in reversed(range(4)):
            inside = slice(16 * block, 16 * block + 16)
            target = weight[row, inside].double()
            for later in range(16 * block + 16, 64):
                target = target + (weight[row, later] - expected[row, later]).double() * lower[later, inside].double()
            expected[row, inside] = target.round().float()
    assert torch.equal(rounded, expected)
    assert states.shape == (2, 4, 256)
    assert torch.equal(matrix_from_tiles(states.reshape(8, 256), 32, 64).float(), expected)


@pytest.mark.parametrize("round_tiles", [to_integers, trellis])
def test_feedback_beats_plain_rounding_where_inputs_are_correlated(round_tiles) -> None:
    weight, hessian = gaussian(64, 64), correlated_hessian(64)
    _, rounded = round_ldlq(weight, block_ldl(damp(hessian, 1e-3).cholesky_II).float(), round_tiles)
    _, plain = round_ldlq(weight, torch.eye(64), round_tiles)
    assert proxy_loss(weight, rounded, hessian) < 0.5 * proxy_loss(weight, plain, hessian)


def test_an_identity_hessian_needs_no_feedback() -> None:
    weight = gaussian(32, 48)
    _, rounded = round_ldlq(weight, block_ldl(damp(torch.eye(48), 1e-2).cholesky_II).float(), trellis)
    _, plain = round_ldlq(weight, torch.eye(48), trellis)
    assert torch.equal(rounded, plain)


def factor(size: int, seed: int = 0) -> torch.Tensor:
    return block_ldl(damp(correlated_hessian(size, seed), 1e-2).cholesky_II).float()


@pytest.mark.parametrize("size", [(48, 64), (64, 32), (16, 48), (48, 16), (16, 16)])
def test_rounding_under_two_hessians_is_the_loop_of_its_formula(size: tuple[int, int]) -> None:
    rows, columns = size
    weight = gaussian(rows, columns) * 5
    lower_in, lower_out = factor(columns), factor(rows, seed=7)
    states, rounded = round_two_sided(weight, lower_in, lower_out, to_integers)
    error = torch.zeros(rows, columns, dtype=torch.float64)
    # F = L_out^T E L_in: with the tile's own error still zero, its F is what the tiles after it leave there.
    for row in reversed(range(rows // TILE)):
        for column in reversed(range(columns // TILE)):
            tile = slice(TILE * row, TILE * row + TILE), slice(TILE * column, TILE * column + TILE)
            left_over = (lower_out.double().T @ error @ lower_in.double())[tile]
            own = weight[tile].double()
            error[tile] = own - (own + left_over).round()
    assert torch.equal(rounded.double(), weight.double() - error)
    assert states.shape == (rows // TILE, columns // TILE, 256)
    assert torch.equal(matrix_from_tiles(states.reshape(-1, 256), rows, columns).float(), rounded)


def test_an_identity_on_the_output_side_is_ldlq() -> None:
    weight, lower = gaussian(48, 64), factor(64)
    states, rounded = round_two_sided(weight, lower, torch.eye(48), trellis)
    expected_states, expected = round_ldlq(weight, lower, trellis)
    assert torch.equal(states, expected_states)
    assert torch.equal(rounded, expected)


def test_feedback_from_both_sides_beats_that_from_one() -> None:
    weight, hessian, output = gaussian(64, 64), correlated_hessian(64), correlated_hessian(64, seed=3)

    def loss(rounded: torch.Tensor) -> float:
        error = (weight - rounded).double()
        return float(((output.double() @ error @ hessian.double()) * error).sum())

    _, both = round_two_sided(weight, factor(64), factor(64, seed=3), trellis)
    _, one = round_ldlq(weight, factor(64), trellis)
    assert loss(both) < 0.5 * loss(one)


def test_relative_proxy_loss_is_the_ratio_of_the_outputs_errors() -> None:
    weight, x_NI = gaussian(8, 16), gaussian(50, 16, seed=3)
    rounded = weight + 0.1 * gaussian(8, 16, seed=4)
    ratio = (x_NI @ (weight - rounded).T).square().sum() / (x_NI @ weight.T).square().sum()
    assert relative_proxy_loss(weight, rounded, x_NI.T @ x_NI) == pytest.approx(float(ratio), rel=1e-5)
    assert relative_proxy_loss(torch.zeros(8, 16), rounded, x_NI.T @ x_NI) == 0.0


def test_a_healthy_hessian_gets_the_damping_asked_for() -> None:
    hessian = correlated_hessian(32).double()
    damped = damp(hessian, 1e-2)
    assert (damped.damping, damped.asked, damped.dead_inputs) == (1e-2, 1e-2, 0)
    expected = hessian + 1e-2 * hessian.diagonal().mean() * torch.eye(32, dtype=torch.float64)
    torch.testing.assert_close(damped.hessian_II, (expected + expected.T) / 2, rtol=1e-12, atol=0)
    assert torch.equal(damped.hessian_II, damped.hessian_II.T)
    torch.testing.assert_close(damped.cholesky_II @ damped.cholesky_II.T, damped.hessian_II, rtol=1e-10, atol=1e-12)


def indefinite(strength: float) -> torch.Tensor:
    direction = torch.nn.functional.normalize(gaussian(32, 1), dim=0)
    hessian = correlated_hessian(32)
    return hessian - strength * hessian.diagonal().mean() * direction @ direction.T


@pytest.mark.parametrize(
    "hessian",
    [
        pytest.param(gaussian(1, 32).T @ gaussian(1, 32), id="rank one"),
        pytest.param(indefinite(1e-4), id="indefinite by rounding"),
        pytest.param(indefinite(30.0), id="far from definite"),
        pytest.param(correlated_hessian(32) * 1e-30, id="tiny"),
        pytest.param(-torch.eye(32) + 1.5 * torch.ones(32, 1) @ torch.ones(1, 32), id="negative eigenvalues"),
    ],
)
@pytest.mark.parametrize("damping", [0.0, 1e-3])
def test_the_ladder_never_gives_up_and_says_how_far_it_went(hessian: torch.Tensor, damping: float) -> None:
    damped = damp(hessian, damping)
    assert torch.isfinite(block_ldl(damped.cholesky_II)).all()
    assert damped.asked == damping
    assert damped.damping >= damping
    mean = float(hessian.double().diagonal().clamp(min=0).mean())
    added = float((damped.hessian_II - hessian.double()).diagonal().mean())
    assert added == pytest.approx(damped.damping * mean, rel=1e-6, abs=1e-12 * mean)


def test_a_climbed_ladder_is_visible() -> None:
    damped = damp(indefinite(1.0), 1e-3)
    assert damped.damping > damped.asked


def test_a_hessian_of_zeros_stands_for_the_identity() -> None:
    damped = damp(torch.zeros(32, 32), 1e-2)
    assert torch.equal(damped.hessian_II, torch.eye(32, dtype=torch.float64))
    assert damped.dead_inputs == 32


def test_dead_inputs_are_counted() -> None:
    assert damp(correlated_hessian(32, dead=(3, 30)), 1e-3).dead_inputs == 2
