"""Experts as linears of their own. Oracle: the fused module, run by transformers' own eager and batched kernels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.moe import use_experts_implementation

from qtipcli.nn.experts import SeparateExperts, is_fused
from qtipcli.nn.plain import make_plain, restore

EXPERTS, FEATURES, INNER, TOKENS, CHOSEN = 5, 12, 7, 11, 2

VARIANTS: dict[str, dict[str, bool]] = {
    "as Mixtral": {},
    "as gpt-oss": {"is_concatenated": False, "is_transposed": True, "has_bias": True},
    "as Nemotron-H": {"has_gate": False},
    "as Aria": {"is_transposed": True},
    "plain with biases": {"has_gate": False, "has_bias": True, "is_transposed": True},
    "with a norm behind each": {"has_post_expert_norm": True},
}

try:
    use_experts_implementation(has_post_expert_norm=True)
except TypeError:  # before transformers 5.17
    del VARIANTS["with a norm behind each"]


def fused_experts(kind: str, implementation: str = "batched_mm") -> nn.Module:
    """A module with random weights that transformers' decorator makes one of fused experts."""
    flags = VARIANTS[kind]
    gated, turned = flags.get("has_gate", True), flags.get("is_transposed", False)
    up, inner = ("gate_up_proj", 2 * INNER) if gated else ("up_proj", INNER)

    class Experts(nn.Module):
        def __init__(self, config: object) -> None:
            super().__init__()
            self.num_experts = EXPERTS
            self.act_fn = nn.SiLU()
            sizes = {up: (inner, FEATURES), "down_proj": (FEATURES, INNER)}
            for name, (rows, columns) in sizes.items():
                shape = (columns, rows) if turned else (rows, columns)
                self.register_parameter(name, nn.Parameter(torch.randn(EXPERTS, *shape)))
                if flags.get("has_bias"):
                    self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(EXPERTS, rows)))
            if flags.get("has_post_expert_norm"):
                self.post_expert_norm = nn.LayerNorm(FEATURES)
                nn.init.normal_(self.post_expert_norm.weight)

        if not flags.get("is_concatenated", True):

            def _apply_gate(self, gate_up: Tensor) -> Tensor:
                return (gate_up[..., 1::2] + 1) * torch.tanh(gate_up[..., ::2])

        def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            raise AssertionError("eager")

    torch.manual_seed(0)
    return use_experts_implementation(**flags)(Experts)(SimpleNamespace(_experts_implementation=implementation))


def request(chosen: int = CHOSEN, experts: int = EXPERTS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(TOKENS, experts, generator=generator)
    weights, index = scores.topk(chosen, dim=-1)
    return torch.randn(TOKENS, FEATURES, generator=generator), index, weights


@torch.no_grad()
def filled(fused: nn.Module) -> tuple[nn.Module, nn.Module, dict[str, nn.Module]]:
    """(the fused module, a model that holds separate ones with its weights, what make_plain replaced)."""
    model = nn.ModuleDict({"experts": copy.deepcopy(fused)})
    exchange = make_plain(model)
    for name, origin in exchange.origins.items():
        tensor = fused.get_parameter(origin.name.removeprefix("experts."))[origin.expert]
        model.get_parameter(name).copy_(tensor.T if origin.transposed else tensor)
    return fused, model, dict(exchange.replaced)


@pytest.mark.parametrize("kind", VARIANTS)
def test_separate_experts_compute_what_fused_ones_do(kind: str) -> None:
    fused, model, _ = filled(fused_experts(kind))
    assert is_fused(fused)
    assert {type(module) for name, module in model.named_modules() if name.count(".") == 2} == {nn.Linear}
    hidden, index, weights = request()
    # Sums of two products of float32; the order of additions differs.
    torch.testing.assert_close(model.experts(hidden, index, weights), fused(hidden, index, weights), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", VARIANTS)
def test_gradients_are_those_of_the_fused_module(kind: str) -> None:
    fused, model, _ = filled(fused_experts(kind))
    found = []
    for module in (fused, model.experts):
        hidden, index, weights = request()
        hidden.requires_grad_(True), weights.requires_grad_(True)
        module(hidden, index, weights).square().sum().backward()
        found.append((hidden.grad, weights.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_an_index_behind_the_last_expert_stands_for_none() -> None:
    _, model, _ = filled(fused_experts("as gpt-oss"))
    hidden, index, weights = request()
    index[3, 1] = EXPERTS
    weights[3, 1] = float("nan")  # whatever stands there
    found = model.experts(hidden, index, weights)
    index[3, 1], weights[3, 1] = 0, 0.0
    torch.testing.assert_close(found, model.experts(hidden, index, weights), rtol=1e-5, atol=1e-5)


def test_tokens_that_all_go_nowhere_give_zeros() -> None:
    _, model, _ = filled(fused_experts("as Mixtral"))
    hidden, index, weights = request()
    assert torch.equal(model.experts(hidden, torch.full_like(index, EXPERTS), weights), torch.zeros_like(hidden))


def test_experts_that_nobody_asks_are_not_called() -> None:
    _, model, _ = filled(fused_experts("as Mixtral"))
    called: list[str] = []
    for name, module in model.named_modules():
        if type(module) is nn.Linear:
            module.register_forward_hook(lambda *_, name=name: called.append(name))
    hidden, index, weights = request()
    model.experts(hidden, index.clamp(max=1), weights)
    assert {name.split(".")[1] for name in called} == {"0", "1"}


class Batched(nn.Module):
    """As Llama 4's: every expert gets a row for each token, zeros where it is not asked."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, FEATURES, 2 * INNER))
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, INNER, FEATURES))
        self.act_fn = nn.SiLU()

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden = hidden_states.view(EXPERTS, -1, FEATURES)
        gate, up = torch.bmm(hidden, self.gate_up_proj).chunk(2, dim=-1)
        return torch.bmm(up * self.act_fn(gate), self.down_proj).view(-1, FEATURES)


def test_batched_experts_compute_the_same_and_see_only_rows_that_ask() -> None:
    torch.manual_seed(0)
    fused, model, _ = filled(Batched())
    rows = torch.randn(EXPERTS * TOKENS, FEATURES)
    rows[torch.rand(len(rows)) < 0.5] = 0
    seen: list[Tensor] = []
    for name, module in model.named_modules():
        if name.endswith("gate_up_proj"):
            module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    torch.testing.assert_close(model.experts(rows), fused(rows), rtol=1e-5, atol=1e-5)
    assert sum(map(len, seen)) == int(rows.any(-1).sum())


@pytest.mark.parametrize("kind", VARIANTS)
def test_restored_experts_are_the_fused_ones_again(kind: str) -> None:
    fused, model, replaced = filled(fused_experts(kind))
    restore(model, replaced)
    assert is_fused(model.experts)
    for one, other in zip(model.experts.named_parameters(), fused.named_parameters(), strict=True):
        assert one[0] == other[0]
        assert torch.equal(one[1], other[1])


def spoiled(change: Callable[[nn.Module], object]) -> nn.Module:
    fused = fused_experts("as Mixtral")
    change(fused)
    return fused


@pytest.mark.parametrize(
    "module",
    [
        spoiled(lambda fused: fused.register_parameter("scale", nn.Parameter(torch.ones(EXPERTS)))),
        spoiled(lambda fused: setattr(fused, "has_bias", True)),
        spoiled(lambda fused: setattr(fused, "num_experts", EXPERTS + 1)),
        nn.Linear(FEATURES, FEATURES),
    ],
    ids=["another parameter", "biases that are not there", "another number", "a linear"],
)
def test_what_is_not_wholly_known_is_left_alone(module: nn.Module) -> None:
    assert not is_fused(module)
    assert not make_plain(nn.ModuleDict({"experts": module})).replaced


def test_what_a_model_reads_from_its_experts_is_there_and_copies_stand_alone() -> None:
    fused, model, _ = filled(fused_experts("with a norm behind each" if len(VARIANTS) == 6 else "as Mixtral"))
    assert isinstance(model.experts, SeparateExperts)
    assert model.experts.num_experts == EXPERTS
    with pytest.raises(AttributeError):
        _ = model.experts.gate_up_proj
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    torch.testing.assert_close(twin.experts(*request()), fused(*request()), rtol=1e-5, atol=1e-5)
