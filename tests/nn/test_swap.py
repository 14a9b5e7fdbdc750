"""Exchanging a model's linears, on a model small enough to compare whole."""

import pytest
import torch
from nn.random_layers import HYB_1_5, ODD, fill
from torch import nn

from qtipcli.errors import QtipError
from qtipcli.nn.embedding import TrellisEmbedding, TrellisHead
from qtipcli.nn.layout import PackedLayout
from qtipcli.nn.linear import TrellisLinear
from qtipcli.nn.swap import dequantize, packed_layers, packed_modules, swap
from qtipcli.quant.transform import Transform


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(100, 37), nn.ReLU(), nn.Linear(37, 5, bias=False), nn.LayerNorm(5))


def test_only_the_named_linears_are_replaced():
    model = small_model().eval().to(torch.bfloat16)
    kept = model[2]
    swap(model, {"0": ODD})
    assert isinstance(model[0], TrellisLinear)
    assert model[2] is kept
    assert list(packed_layers(model)) == ["0"]
    assert not model[0].training
    assert model[0].weight.dtype == model[0].bias.dtype == torch.bfloat16


def test_a_meta_model_stays_on_meta():
    with torch.device("meta"):
        model = small_model()
    swap(model, {"0": ODD})
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    ("layouts", "fact"),
    [
        ({"7": ODD}, "has no layer 7"),
        ({"1": ODD}, "layer 1 is ReLU, not a linear"),
        ({"0": PackedLayout(100, 36, HYB_1_5, bias=True)}, "layer 0 is 37 x 100 with bias True in the model, but 36 x 100"),
        ({"0": PackedLayout(100, 37, HYB_1_5)}, "but 37 x 100 with bias False"),
        ({"0": ODD, "2": PackedLayout(37, 6, HYB_1_5)}, "layer 2 is 5 x 37"),
    ],
)
def test_a_table_that_does_not_fit_is_refused_before_anything_changes(layouts, fact):
    model = small_model()
    with pytest.raises(QtipError, match=fact):
        swap(model, layouts)
    assert not packed_layers(model)


def test_dequantize_gives_the_plain_model_that_the_packed_one_stands_for():
    model = small_model()
    swap(model, {"0": ODD})
    layer = fill(model[0])
    x = torch.randn(3, 100)
    packed = model(x)
    dequantize(model, torch.float32)
    assert type(model[0]) is nn.Linear
    assert torch.equal(model[0].weight, layer.weight_dense())
    assert torch.equal(model[0].bias, layer.bias)
    assert model[0].weight.requires_grad
    # Both are float32 sums of 112 terms of size one in another order; LayerNorm makes the outputs of size one.
    torch.testing.assert_close(model(x), packed, rtol=0, atol=1e-4)


def test_a_layer_that_is_not_in_memory_cannot_be_dequantized():
    with torch.device("meta"):
        model = small_model()
    swap(model, {"0": ODD})
    with pytest.raises(QtipError, match="layer 0 cannot be dequantized"):
        dequantize(model, torch.float32)


TOKENS = PackedLayout(20, 37, HYB_1_5, Transform(), Transform("block", 16), embedding=True)


class Doubled(nn.Embedding):
    """Computes more than a look-up, as Gemma's does."""

    def forward(self, ids):
        return 2 * super().forward(ids)


def language_model(kind: type[nn.Embedding] = nn.Embedding, **how) -> nn.Sequential:
    """Embedding and head, tied."""
    torch.manual_seed(0)
    model = nn.Sequential(kind(37, 20, padding_idx=3, **how), nn.Linear(20, 37, bias=False))
    model[1].weight = model[0].weight
    return model


def test_an_embedding_and_the_head_tied_to_it_are_exchanged_and_back():
    model = language_model()
    swap(model, {"0": TOKENS}, {"1": "0"})
    assert isinstance(model[0], TrellisEmbedding)
    assert isinstance(model[1], TrellisHead)
    assert model[1].embedding is model[0]
    assert list(packed_modules(model)) == ["0"]
    assert not packed_layers(model)
    packed, ids = fill(model[0]), torch.tensor([[1, 36, 2]])
    logits = model(ids)
    dequantize(model, torch.float32)
    assert (type(model[0]), type(model[1])) == (nn.Embedding, nn.Linear)
    assert model[0].padding_idx == 3
    assert model[0].weight is model[1].weight
    assert torch.equal(model[0].weight, packed.weight_dense())
    torch.testing.assert_close(model(ids), logits, rtol=0, atol=1e-4)  # float32 sums of 32 terms in another order


@pytest.mark.parametrize(
    ("model", "layouts", "heads", "fact"),
    [
        (language_model(Doubled), {"0": TOKENS}, {}, "layer 0 is Doubled, not a torch.nn.Embedding"),
        (language_model(), {"1": TOKENS}, {}, "layer 1 is Linear, not a torch.nn.Embedding"),
        (language_model(), {"0": PackedLayout(20, 37, HYB_1_5)}, {}, "layer 0 is Embedding, not a linear"),
        (language_model(), {"0": PackedLayout(20, 38, HYB_1_5, embedding=True)}, {}, "embedding 0 is 37 x 20 .* but 38 x 20"),
        (language_model(), {"0": TOKENS}, {"0": "0"}, "layer 0 is Embedding, not a linear"),
        (nn.Sequential(nn.Embedding(37, 20), nn.Linear(20, 36)), {"0": TOKENS}, {"1": "0"}, "layer 1 is 36 x 20"),
        (nn.Sequential(nn.Embedding(37, 20), nn.Linear(20, 37)), {"0": TOKENS}, {"1": "0"}, "layer 1 .* with bias True"),
    ],
)
def test_an_embedding_that_does_not_fit_is_refused_before_anything_changes(model, layouts, heads, fact):
    with pytest.raises(QtipError, match=fact):
        swap(model, layouts, heads)
    assert not packed_modules(model)
