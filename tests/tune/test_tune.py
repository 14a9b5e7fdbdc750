"""Layers, parameters, steps and activations of tuning. Oracles: the packed layer, torch's autograd, an undisturbed run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from nn.random_layers import HYB_1_5, ODD, ONE_MAD_2, random_layer
from torch import nn

from qtipcli.errors import QtipError, StorageError
from qtipcli.nn.layout import PackedLayout
from qtipcli.quant.transform import Transform
from qtipcli.tune.activations import Activations
from qtipcli.tune.descent import Descent, largest_divisor, order
from qtipcli.tune.linear import TunedLinear
from qtipcli.tune.parameters import Rates, Trained

SQUARE = PackedLayout(48, 48, ONE_MAD_2)
RATES = Rates(scales=1e-2, norms=1e-2, luts=1e-2)
DTYPES = {"norm.weight": torch.bfloat16, "odd.bias": torch.float32}


def rows(features: int) -> torch.Tensor:
    return torch.randn(7, features, generator=torch.Generator().manual_seed(5))


class Pair(nn.Module):
    """Two layers with one scale_in, one with its own, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        first, second, third = (random_layer(SQUARE, seed) for seed in (0, 1, 2))
        second.scale_in.data = first.scale_in.detach().clone()
        self.q, self.k, self.v = TunedLinear(first), TunedLinear(second), TunedLinear(third)
        self.norm = nn.LayerNorm(48, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        return self.q(x) + self.k(x) + self.v(x)


@pytest.mark.parametrize("layout", [ODD, SQUARE, PackedLayout(352, 128, HYB_1_5, Transform("block"), Transform("block"))])
@pytest.mark.parametrize("trains_lut", [False, True])
def test_a_tuned_layer_computes_what_the_packed_one_does(layout: PackedLayout, trains_lut: bool) -> None:
    """Same sums in another order: float32's error of some hundred terms."""
    layer = random_layer(layout)
    x = rows(layout.in_features)
    torch.testing.assert_close(TunedLinear(layer, trains_lut)(x), layer(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("trains_lut", [False, True])
def test_its_gradients_are_those_of_the_packed_layer(trains_lut: bool) -> None:
    layer = random_layer(ODD)
    tuned = TunedLinear(layer, trains_lut)
    layer.unfreeze()
    layer.bias.requires_grad_(True)
    for module in (tuned, layer):
        module(rows(ODD.in_features)).square().sum().backward()
    for name in ("scale_in", "scale_out", "bias", *(["lut"] if trains_lut else [])):
        torch.testing.assert_close(getattr(tuned, name).grad, getattr(layer, name).grad, rtol=1e-3, atol=1e-3)


def test_equal_input_scales_become_one_parameter_and_stay_equal() -> None:
    block = Pair()
    trained = Trained(block, "", DTYPES, RATES)
    assert block.q.scale_in is block.k.scale_in
    assert block.v.scale_in is not block.q.scale_in
    descent = Descent(trained, 5)
    x = rows(48)
    for _ in range(5):
        descent.take_step(lambda: backward(block(x).square().mean()))
    stored = trained.stored()
    assert torch.equal(stored["q.scale_in"], stored["k.scale_in"])
    assert not torch.equal(stored["q.scale_in"], random_layer(SQUARE, 0).scale_in)
    assert stored["q.scale_in"].dtype == torch.float16
    assert stored["norm.weight"].dtype == torch.bfloat16


def test_layers_of_two_parents_share_nothing() -> None:
    block = nn.ModuleDict({"a": Pair(), "b": Pair()})
    Trained(block, "", {}, RATES)
    assert block["a"].q.scale_in is not block["b"].q.scale_in


def test_a_rate_of_zero_leaves_its_parameters_out() -> None:
    trained = Trained(Pair(), "", DTYPES, Rates(1e-2, 0, 0))
    assert all(name.endswith(("scale_in", "scale_out")) for name in trained.names)
    assert not Pair().norm.weight.grad


def test_rounding_is_undone_to_the_bit() -> None:
    block = Pair()
    trained = Trained(block, "", DTYPES, RATES)
    with torch.no_grad():
        block.q.scale_out.add_(1e-6)
    before = block.q.scale_out.detach().clone()
    with trained.rounded():
        assert torch.equal(block.q.scale_out, block.q.scale_out.half().float())
    assert torch.equal(block.q.scale_out, before)
    assert not torch.equal(before, before.half().float())


def test_the_best_state_is_kept_even_if_it_is_the_first() -> None:
    block = Pair()
    trained = Trained(block, "", DTYPES, RATES)
    descent = Descent(trained, 3)
    start = trained.stored()
    assert descent.judge(lambda: 1.0) == 1.0
    descent.take_step(lambda: backward(block(rows(48)).square().mean()))
    descent.judge(lambda: 2.0)
    assert all(torch.equal(descent.best[name], start[name]) for name in start)
    descent.judge(lambda: 0.5)
    assert not torch.equal(descent.best["q.scale_out"], start["q.scale_out"])
    descent.judge(lambda: float("nan"))
    assert descent.best_loss == 0.5


def test_a_restored_descent_takes_the_same_steps_to_the_bit() -> None:
    def steps(descent: Descent, block: Pair, count: int) -> None:
        for _ in range(count):
            x = torch.randn(3, 48, generator=torch.Generator().manual_seed(descent.step))
            descent.take_step(lambda x=x: backward(block(x).square().mean()))

    whole = Pair()
    undisturbed = Descent(Trained(whole, "", DTYPES, RATES), 10)
    steps(undisturbed, whole, 10)
    first = Pair()
    stopped = Descent(Trained(first, "", DTYPES, RATES), 10)
    stopped.judge(lambda: 3.0)
    steps(stopped, first, 4)
    saved = {name: tensor.clone() for name, tensor in stopped.state().items()}
    second = Pair()
    resumed = Descent(Trained(second, "", DTYPES, RATES), 10)
    resumed.restore(saved)
    assert (resumed.step, resumed.best_loss) == (4, 3.0)
    steps(resumed, second, 6)
    for name, master in undisturbed.trained.masters.items():
        assert torch.equal(master, resumed.trained.masters[name]), name


def test_a_loss_that_is_not_finite_ends_the_run() -> None:
    with pytest.raises(QtipError, match="loss of tuning is nan"):
        Descent(Trained(Pair(), "", DTYPES, RATES), 3).take_step(lambda: float("nan"))


def test_an_order_holds_everything_once_and_changes_with_the_epoch() -> None:
    assert sorted(order(20, 0, 0)) == list(range(20))
    assert order(20, 0, 0) == order(20, 0, 0) != order(20, 0, 1)
    assert order(20, 1, 0) != order(20, 0, 0)


def test_a_step_is_divided_without_a_rest() -> None:
    assert [largest_divisor(8, limit) for limit in (0, 1, 3, 5, 8, 100)] == [1, 1, 2, 4, 8, 8]


@pytest.mark.parametrize("in_file", [False, True])
def test_activations_come_back_as_written(in_file: bool, tmp_path: Path) -> None:
    shapes = [(2, 3, 5), (2, 3, 5), (1, 3, 5)]
    kept = Activations(shapes, torch.bfloat16, tmp_path / "file" if in_file else None)
    batches = [torch.randn(shape).to(torch.bfloat16) for shape in shapes]
    for index in (2, 0, 1, 0):
        kept.write(index, batches[index])
    assert all(torch.equal(kept.read(index), batch) for index, batch in enumerate(batches))
    assert not list(tmp_path.iterdir()), "the file has no name"
    kept.close()


def test_activations_say_where_they_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="absent"):
        Activations([(1, 1, 1)], torch.float32, tmp_path / "absent" / "file")


def backward(loss: torch.Tensor) -> float:
    loss.backward()
    return float(loss.detach())
