"""The incoherence transform. Oracle: its formula with dense matrices, and what an orthonormal turn must leave alone."""

from __future__ import annotations

import pytest
import torch

from qtipcli.quant.incoherence import random_signs, rotate_hessian, rotate_inputs, rotate_weight, rotate_weight_back
from qtipcli.quant.transform import Transform, padded
from quant.matrices import correlated_hessian, gaussian

TRANSFORMS = [Transform(), Transform("block"), Transform("block", 16)]
SIZES = [(100, 37), (64, 64), (37, 100), (16, 176), (1, 3), (256, 384)]


def signs_of(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    return random_signs(rows, 0, "layer.out"), random_signs(columns, 0, "layer.in")


def turn(dimension: int, signs: torch.Tensor, transform: Transform) -> torch.Tensor:
    """H S with its padding, [padded, dimension] in float64: what happens to each unit vector."""
    return rotate_inputs(torch.eye(dimension, dtype=torch.float32), signs, transform).T.double()


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_turning_back_undoes_the_turn(size: tuple[int, int], transform: Transform) -> None:
    weight = gaussian(*size)
    signs = signs_of(*size)
    turned = rotate_weight(weight, *signs, transform)
    assert turned.shape == (padded(size[0]), padded(size[1]))
    torch.testing.assert_close(rotate_weight_back(turned, *signs, transform), weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_the_turn_is_orthonormal_and_the_formula(size: tuple[int, int], transform: Transform) -> None:
    signs_O, signs_I = signs_of(*size)
    out, into = turn(size[0], signs_O, transform), turn(size[1], signs_I, transform)
    torch.testing.assert_close(into.T @ into, torch.eye(size[1], dtype=torch.float64), rtol=0, atol=1e-5)
    weight = gaussian(*size)
    expected = (out @ weight.double() @ into.T).float()
    torch.testing.assert_close(rotate_weight(weight, signs_O, signs_I, transform), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_the_proxy_energy_does_not_change(size: tuple[int, int], transform: Transform) -> None:
    weight, hessian = gaussian(*size), correlated_hessian(size[1])
    signs = signs_of(*size)
    turned = rotate_weight(weight, *signs, transform).double()
    turned_hessian = rotate_hessian(hessian.double(), signs[1], transform)
    before = ((weight.double() @ hessian.double()) * weight).sum()
    after = ((turned @ turned_hessian.double()) * turned).sum()
    assert float(after) == pytest.approx(float(before), rel=1e-5)


def test_a_spike_is_spread_over_the_block() -> None:
    weight = torch.zeros(128, 256)
    weight[3, 200] = 1.0
    signs = signs_of(128, 256)
    full = rotate_weight(weight, *signs, Transform()).abs()
    torch.testing.assert_close(full, torch.full((128, 256), (128 * 256) ** -0.5), rtol=1e-4, atol=0)
    blocks = rotate_weight(weight, *signs, Transform("block", 128)).abs()
    assert not blocks[:, :128].any()
    torch.testing.assert_close(blocks[:, 128:], torch.full((128, 128), 1 / 128), rtol=1e-4, atol=0)


def test_signs_depend_on_seed_and_name_alone() -> None:
    signs = random_signs(512, 0, "layer")
    random_signs(7, 3, "another")
    torch.manual_seed(99)
    assert torch.equal(random_signs(512, 0, "layer"), signs)
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(float(signs.mean())) < 0.2
    for seed, name in ((1, "layer"), (0, "layer2")):
        assert 0.3 < float((random_signs(512, seed, name) == signs).float().mean()) < 0.7


def test_signs_of_this_version_are_those_of_every_version() -> None:
    # Recorded: a packed model's signs are stored, but a job resumed with a newer version must go on with the same.
    assert random_signs(12, 0, "model.layers.0.mlp.up_proj.in").to(torch.int8).tolist() == [
        -1,
        1,
        -1,
        1,
        1,
        1,
        -1,
        -1,
        -1,
        -1,
        1,
        -1,
    ]
