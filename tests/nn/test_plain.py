"""Modules that compute as linears do are known by trying. Oracle: what the modules themselves return."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from qtipcli.nn.plain import make_plain, restore


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 32))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = nn.functional.linear(x, self.weight)
        return logits, logits.topk(2).indices


class Failing(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        raise TypeError("needs more than x")


def filled(module: nn.Module) -> tuple[nn.Module, dict[str, nn.Module]]:
    """A model in which the module was replaced, with its values."""
    model = nn.ModuleDict({"inner": copy.deepcopy(module)})
    exchange = make_plain(model)
    for name, origin in exchange.origins.items():
        tensor = module.get_parameter(origin.name.removeprefix("inner.")).detach()
        model.get_parameter(name).data = (tensor.T if origin.transposed else tensor).clone()
    return model, dict(exchange.replaced)


@pytest.mark.parametrize(
    "module",
    [Conv1D(48, 32), Conv1D(32, 32), FalconLinear(32, 48), FalconLinear(32, 32, bias=False)],
    ids=["Conv1D", "a square Conv1D", "a subclass", "a square subclass without bias"],
)
def test_what_computes_as_a_linear_becomes_one_and_comes_back(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    model, replaced = filled(module)
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    assert type(model.inner) is nn.Linear
    torch.testing.assert_close(model.inner(x), module(x))
    model.inner.weight.data *= 2
    restore(model, replaced)
    assert type(model.inner) is type(module)
    assert torch.equal(model.inner.weight, 2 * module.weight)
    assert torch.equal(model.inner(torch.zeros(1, 32)), module(torch.zeros(1, 32)))


@pytest.mark.parametrize(
    "module",
    [
        Scaled(32, 48),
        Router(),
        Failing(32, 48),
        nn.Embedding(48, 32),
        nn.Conv1d(32, 32, 3),
        nn.Bilinear(4, 4, 4),
        nn.LayerNorm(32),
    ],
    ids=lambda module: type(module).__name__,
)
def test_what_computes_something_else_stays(module: nn.Module) -> None:
    model, replaced = filled(module)
    assert not replaced
    assert type(model.inner) is type(module)


def test_a_model_on_meta_is_known_as_well() -> None:
    """As transformers builds it before it loads weights."""
    with torch.device("meta"):
        model = nn.ModuleDict({"inner": Conv1D(48, 32)})
        assert make_plain(model).origins["inner.weight"].transposed
    assert model.inner.weight.is_meta
    assert model.inner.weight.shape == (48, 32)


def test_a_tied_matrix_stays() -> None:
    model = nn.ModuleDict({"one": Conv1D(32, 32), "other": Conv1D(32, 32)})
    model.other.weight = model.one.weight
    assert not make_plain(model).replaced
