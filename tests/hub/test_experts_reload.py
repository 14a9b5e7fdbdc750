"""Packed experts and Conv1D through transformers: saved again, without the head, and back as what they were.

Oracle: the loaded model itself, and for what was dequantized transformers without a packed module.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from stages.families import save, take_through
from stages.tiny import logits, logits_of
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from qtipcli.nn.experts import SeparateExperts, is_fused
from qtipcli.nn.linear import TrellisLinear

KINDS = ("Mixtral", "gpt-oss", "GPT-2")
TOKENS = torch.randint(1, 3072, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family -> packed directory; read only."""
    found = {}
    for family in KINDS:
        found[family] = tmp_path_factory.mktemp("family")
        take_through(family, found[family])
    return {family: path / "out" for family, path in found.items()}


def load(directory: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", KINDS)
def test_saved_again_it_is_the_same_model(packed: dict[str, Path], family: str, tmp_path: Path) -> None:
    model = load(packed[family])
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(tmp_path), logits_of(model))


@pytest.mark.parametrize("family", KINDS)
def test_dequantized_it_is_a_model_of_transformers_again(packed: dict[str, Path], family: str, tmp_path: Path) -> None:
    model = load(packed[family])
    expected = logits_of(model)
    model.dequantize()
    kinds = {type(module) for module in model.modules()}
    assert not kinds & {TrellisLinear, SeparateExperts}
    assert any(map(is_fused, model.modules())) == (family != "GPT-2")
    model.save_pretrained(tmp_path)
    shapes = {name: parameter.shape for name, parameter in load(save(family, tmp_path / "original")).named_parameters()}
    plain = load(tmp_path)
    assert {name: parameter.shape for name, parameter in plain.named_parameters()} == shapes
    torch.testing.assert_close(logits_of(plain), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("family", KINDS)
def test_without_its_head_it_has_the_same_hidden_states(packed: dict[str, Path], family: str) -> None:
    with torch.no_grad():
        found = AutoModel.from_pretrained(packed[family], dtype=torch.float32).eval()(TOKENS).last_hidden_state
        expected = load(packed[family]).base_model(TOKENS).last_hidden_state
    assert torch.equal(found, expected)


def test_every_expert_is_packed_and_nothing_of_the_fused_tensors_is_left(packed: dict[str, Path]) -> None:
    model = load(packed["gpt-oss"])
    experts = [module for module in model.modules() if isinstance(module, SeparateExperts)]
    assert len(experts) == 2
    for module in experts:
        linears = [each for each in module.modules() if isinstance(each, TrellisLinear)]
        assert len(linears) == 2 * module.num_experts
        assert all(linear.bias is not None for linear in linears)
        assert all(parameter.is_meta for parameter in module._fused[0].parameters(recurse=False))


def test_gradients_reach_what_stands_before_packed_experts(packed: dict[str, Path]) -> None:
    model = load(packed["Mixtral"])
    embedded = model.get_input_embeddings()(TOKENS).detach().requires_grad_(True)
    model(inputs_embeds=embedded).logits.square().mean().backward()
    assert torch.isfinite(embedded.grad).all()
    assert embedded.grad.abs().sum() > 0
