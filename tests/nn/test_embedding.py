"""A packed embedding and the head that is tied to it, against the dense matrix that they stand for.

Oracle: `weight_dense`, which has tests of its own against the formula (test_trellis_linear.py), and that formula in float64.
"""

import copy

import pytest
import torch
from nn.random_layers import HYB_1_5, LUT_2, MUL1_3_SHORT, ONE_MAD_2, fill

from qtipcli.errors import QtipError
from qtipcli.nn import embedding as embedding_module
from qtipcli.nn.embedding import TrellisEmbedding, TrellisHead
from qtipcli.nn.layout import PackedLayout
from qtipcli.quant.transform import Transform
from qtipcli_kernels import dispatch

ROWS = Transform("block", 16)
LAYOUTS = {
    "37 tokens of 48 values, table": PackedLayout(48, 37, HYB_1_5, Transform(), ROWS, embedding=True),
    "100 values": PackedLayout(100, 90, ONE_MAD_2, Transform("block"), ROWS, embedding=True),
    "full on the side of the tokens": PackedLayout(48, 90, LUT_2, Transform(), Transform(), embedding=True),
    "blocks of 32 tokens": PackedLayout(64, 96, MUL1_3_SHORT, Transform(), Transform("block", 32), embedding=True),
}
BY_16 = LAYOUTS["37 tokens of 48 values, table"]


def random_embedding(layout: PackedLayout = BY_16, dtype: torch.dtype = torch.float32) -> TrellisEmbedding:
    return fill(TrellisEmbedding(layout, dtype=dtype))


def some_ids(layout: PackedLayout, *shape: int) -> torch.Tensor:
    ids = torch.randint(0, layout.out_features, shape, generator=torch.Generator().manual_seed(2))
    ids.view(-1)[:2] = torch.tensor([0, layout.out_features - 1])
    return ids


def assert_same_rows(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for the order of sums: the transform's dense factor is a library product, which looks at the number of rows.

    Rows of size one are sums of at most 112 terms, rounded to 2^-24 each.
    """
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tile rows of each call of the decoder."""
    rows: list[int] = []

    def decode(trellis, spec, lut=None):
        rows.append(len(trellis))
        return real(trellis, spec, lut)

    real = dispatch.decode
    monkeypatch.setattr(embedding_module.dispatch, "decode", decode)
    return rows


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 9), (2,), (40,)])
def test_rows_are_those_of_the_dense_matrix(layout, shape):
    embedding = random_embedding(layout)
    ids = some_ids(layout, *shape)
    assert_same_rows(embedding(ids), embedding.weight_dense()[ids])


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_one_token_is_looked_up_like_many(layout):
    embedding = random_embedding(layout)
    for token in (0, 17, layout.out_features - 1):
        assert_same_rows(embedding(torch.tensor([[token]])), embedding.weight_dense()[None, None, token])


def test_only_the_tile_rows_of_the_tokens_are_decoded_each_once(decoded):
    embedding = random_embedding(LAYOUTS["100 values"])
    embedding(torch.tensor([1, 15, 3, 80, 1]))
    assert decoded == [2]
    decoded.clear()
    embedding(torch.tensor([[81]]))
    assert decoded == [1]


def test_what_is_decoded_at_once_is_bounded_and_changes_nothing(decoded, monkeypatch):
    embedding = random_embedding(LAYOUTS["100 values"])
    ids = some_ids(embedding.layout, 5, 30)
    whole = embedding(ids)
    decoded.clear()
    monkeypatch.setattr(dispatch, "STRIP_WEIGHTS", 2 * 16 * 112 + 1)  # two tile rows of 100 values, padded
    assert_same_rows(embedding(ids), whole)
    assert decoded == [2, 2, 2]
    decoded.clear()
    monkeypatch.setattr(embedding_module, "_is_recorded", lambda tensor: True)
    assert_same_rows(embedding(ids), whole)
    assert max(decoded) == 2


@pytest.mark.parametrize("token", [37, 47, 48, -1])
def test_a_token_outside_of_the_vocabulary_is_refused_as_by_torch(token):
    embedding = random_embedding()
    with pytest.raises(IndexError):
        torch.nn.Embedding(37, 48)(torch.tensor([3, token]))
    with pytest.raises(IndexError):
        embedding(torch.tensor([3, token]))
    with pytest.raises(IndexError):
        embedding(torch.tensor([token]))


def test_shapes_are_kept_and_may_be_empty():
    embedding = random_embedding()
    assert embedding(torch.tensor(3)).shape == (48,)
    assert embedding(torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0, 48)
    assert embedding(torch.tensor([[3]], dtype=torch.int32)).shape == (1, 1, 48)


def test_rows_are_in_the_models_dtype_and_rounded_once():
    embedding, ids = random_embedding(), torch.tensor([1, 2, 30])
    exact = embedding(ids)
    embedding.to(torch.bfloat16)
    assert embedding.scale_in.dtype == torch.float16
    assert torch.equal(embedding(ids), exact.to(torch.bfloat16))


def test_the_dtype_of_a_model_that_begins_with_it_is_the_weights():
    # transformers takes it from the first floating parameter.
    first = next(
        parameter for parameter in random_embedding(dtype=torch.bfloat16).parameters() if parameter.is_floating_point()
    )
    assert first.dtype == torch.bfloat16


def test_it_compiles_into_one_graph():
    embedding, ids = random_embedding(), torch.tensor([[1, 2, 30, 2]])
    assert_same_rows(torch.compile(embedding, backend="eager", fullgraph=True)(ids), embedding(ids))


def test_a_tied_head_multiplies_by_the_embeddings_matrix():
    embedding = random_embedding()
    x = torch.randn(5, 48, requires_grad=True)
    dense = embedding.weight_dense().double()
    # Float32 sums of 48 terms of size one and a transform before and after: a few units of 2^-24 each.
    torch.testing.assert_close(TrellisHead(embedding)(x).double(), x.double() @ dense.T, rtol=0, atol=1e-4)
    upstream = torch.randn(5, 37)
    TrellisHead(embedding)(x).backward(upstream)
    torch.testing.assert_close(x.grad.double(), upstream.double() @ dense, rtol=0, atol=1e-4)


def test_a_tied_head_holds_nothing_and_follows_its_embedding():
    model = torch.nn.ModuleDict({"embedding": random_embedding()})
    model["head"] = TrellisHead(model["embedding"])
    model["head"].weight = torch.nn.Parameter(model["embedding"].weight)  # as transformers ties, when it is asked to again
    assert not list(model["head"].parameters())
    assert model["head"].weight is model["embedding"].weight
    x = torch.randn(2, 48)
    before = model["head"](x)
    twin = copy.deepcopy(model)
    assert twin["head"].embedding is twin["embedding"]
    with torch.no_grad():
        model["embedding"].scale_out.mul_(2)
    assert torch.equal(model["head"](x), 2 * before)
    assert torch.equal(twin["head"](x), before)
    compiled = torch.compile(twin["head"], backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), before)


def test_a_tied_head_without_its_embedding_in_memory_says_so():
    head = TrellisHead(TrellisEmbedding(BY_16, device="meta"))
    with pytest.raises(QtipError, match="packed embedding"):
        head(torch.randn(2, 48))
