"""docs/format.md is executable: its example is read by the reader, and its vectors are what unpacking and the codes give."""

import json
import re
from pathlib import Path

import pytest
import torch

from qtipcli.hub.config import LAYER_FIELDS, OPTIONAL, REQUIRED, QtipConfig
from qtipcli.nn.embedding import TrellisEmbedding
from qtipcli.nn.layout import PackedLayout
from qtipcli.quant.transform import Transform
from qtipcli_kernels import codes, packing
from qtipcli_kernels.hadamard import reference
from qtipcli_kernels.hadamard.factor import factor
from qtipcli_kernels.spec import TrellisSpec

DOCUMENT = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")
TRANSFORMS = re.search(r"^```transform\n(.*?)^```", DOCUMENT, re.DOTALL | re.MULTILINE)[1].splitlines()
EMBEDDING = re.search(r"^```embedding\n(.*?)^```", DOCUMENT, re.DOTALL | re.MULTILINE)[1].splitlines()
VECTORS = re.findall(r"^```vector (\w+) (\d) (\d)\n(.*?)^```", DOCUMENT, re.DOTALL | re.MULTILINE)


def ring(spec: TrellisSpec) -> torch.Tensor:
    """The documented tile: bytes 0, 1, 2, ... with the most significant byte of each word first; int32 [1, W]."""
    words = [int.from_bytes(bytes(range(4 * word, 4 * word + 4)), "big") for word in range(spec.words_per_tile)]
    return torch.tensor([words], dtype=torch.int32)


def test_the_example_config_is_read():
    example = json.loads(re.search(r"```json\n(.*?)```", DOCUMENT, re.DOTALL)[1])
    read = QtipConfig.from_dict(example)
    assert read.to_dict() == example
    layouts = read.layouts()
    assert layouts["model.layers.0.self_attn.q_proj"] == PackedLayout(256, 256, TrellisSpec("hyb", 3))
    assert layouts["model.layers.0.mlp.down_proj"].block_in == 64


def test_every_field_is_described():
    for field in (*REQUIRED, *OPTIONAL, *LAYER_FIELDS):
        assert f"`{field}`" in DOCUMENT


def test_every_tensor_is_described():
    for spec in (TrellisSpec("hyb", 4), TrellisSpec("lut", 2)):
        for name in PackedLayout(16, 16, spec, bias=True).tensors():
            assert f"`.{name}`" in DOCUMENT


@pytest.mark.parametrize(("code", "bits", "values", "lines"), VECTORS)
def test_the_vectors_are_right(code, bits, values, lines):
    spec = TrellisSpec(code, int(bits), weights_per_step=int(values))
    states = packing.unpack(ring(spec), spec)[0].tolist()
    for line in lines.splitlines():
        kind, step, *stated = line.split()
        state = states[int(step)]
        if kind == "state":
            assert state == int(stated[0], 16)
        elif kind == "entry":
            h = (state * state + state) % 2**32
            assert [h >> 6 & 511, h >> 15 & 1, h >> 31] == [int(number) for number in stated]
            # A table whose entries are their own numbers shows which one the code reads, and the signs it gives them.
            table = torch.arange(512.0).repeat(2, 1).T + 1
            signs = [1 - 2 * int(stated[1]), 1 - 2 * int(stated[2])]
            expected = [(int(stated[0]) + 1) * sign for sign in signs]
            read = codes.values(torch.tensor([state]), TrellisSpec("hyb2", spec.bits_per_step), table)[0]
            assert read.tolist() == expected
        else:
            value = codes.values(torch.tensor([state]), TrellisSpec(kind, spec.bits_per_step))
            assert value.item() == float(stated[0])


@pytest.mark.parametrize("line", TRANSFORMS)
def test_the_transforms_are_right(line):
    n, kind, order, *stated = line.split()
    factors = factor(int(n))
    assert (factors.kind, len(factors.dense), factors.power_of_two) == (kind, int(order), int(n) // int(order))
    row = factors.dense[min(2, int(order) - 1), : len(stated)] * int(order) ** 0.5
    assert row.tolist() == pytest.approx([float(entry) for entry in stated], abs=1e-6)  # six decimals in the document


def test_the_order_of_the_two_factors_is_right():
    x = torch.randn(48, dtype=torch.float64)
    factors = factor(48)
    inner = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], dtype=torch.float64) / 2
    y = torch.einsum("ac,bd,cd->ab", factors.dense, inner, x.reshape(12, 4)).reshape(48)
    torch.testing.assert_close(reference.hadamard(x, 48), y, rtol=0, atol=1e-14)  # float64, sums of 48 terms of size one


def test_both_vectors_were_found():
    assert [vector[:3] for vector in VECTORS] == [("1mad", "2", "1"), ("hyb", "3", "2")]


def test_the_formula_for_the_order_of_weights_is_packings():
    for position in range(256):
        lane, r = position // 8, position % 8
        row = lane // 4 + 8 * (r // 2 % 2)
        column = 2 * (lane % 4) + r % 2 + 8 * (r // 4)
        assert packing.WALK_TO_TILE[position].item() == 16 * row + column


def test_the_rows_of_the_embedding_are_right():
    """By definition: values in the documented order, Sylvester's matrix by its formula on both sides."""
    spec = TrellisSpec("1mad", 2)
    values = codes.values(packing.unpack(ring(spec), spec), spec).reshape(256).double()
    tile = torch.empty(256, dtype=torch.float64)
    tile[packing.WALK_TO_TILE] = values
    sylvester = torch.tensor([[(-1) ** (b & c).bit_count() / 4 for c in range(16)] for b in range(16)], dtype=torch.float64)
    dense = sylvester.T @ tile.reshape(16, 16) @ sylvester
    by_16 = Transform("block", 16)
    layer = TrellisEmbedding(PackedLayout(16, 16, spec, by_16, by_16, embedding=True), dtype=torch.float32)
    layer.trellis.data = ring(spec)
    assert len(EMBEDDING) == 3
    for line in EMBEDDING:
        token, *stated = line.split()
        expected = pytest.approx([float(value) for value in stated], abs=1e-6)  # six decimals in the document
        assert dense[int(token), : len(stated)].tolist() == expected
        assert layer(torch.tensor(int(token)))[: len(stated)].tolist() == expected
