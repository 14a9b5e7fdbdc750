"""Transforms and sizes of a packed layer, against the arithmetic of docs/format.md done by hand."""

import pytest

from qtipcli.errors import QtipError
from qtipcli.nn.layout import PackedLayout
from qtipcli.quant.transform import Transform
from qtipcli_kernels.spec import TrellisSpec


@pytest.mark.parametrize(
    ("transform", "dimension", "block"),
    [
        (Transform("full"), 5632, 5632),
        (Transform("full"), 100, 112),
        (Transform("block"), 4096, 128),
        (Transform("block"), 704, 64),
        (Transform("block"), 4544, 64),
        (Transform("block"), 100, 16),
        (Transform("block"), 37, 16),
        (Transform("block", 32), 4096, 32),
        (Transform("block", 256), 4096, 256),
    ],
)
def test_the_block_divides_the_padded_dimension(transform, dimension, block):
    assert transform.block_of(dimension) == block


@pytest.mark.parametrize("transform", [Transform(), Transform("block"), Transform("block", 64)])
def test_a_transform_is_written_as_text_and_read_back(transform):
    assert Transform.parse(str(transform)) == transform


@pytest.mark.parametrize("text", ["Full", "block", "block-0", "block-100", "block-8", "block-128 ", 128, None])
def test_an_unknown_transform_is_refused_by_name(text):
    with pytest.raises(QtipError, match=r"(?i)transform"):
        Transform.parse(text)


@pytest.mark.parametrize("arguments", [("half",), ("block", 48), ("block", 8), ("full", 64)])
def test_a_transform_that_does_not_exist_cannot_be_made(arguments):
    with pytest.raises(QtipError):
        Transform(*arguments)


def test_stored_bits_count_padding_scales_and_table_but_not_the_bias():
    layout = PackedLayout(100, 37, TrellisSpec("hyb", 3), bias=True)
    # 3 x 7 tiles of 256 weights at 1.5 bits; 137 scales and 512 x 2 table entries of 16 bits.
    assert layout.trellis_shape == (3, 7 * 12)
    assert layout.stored_bits == 3 * 7 * 384 + 16 * (137 + 1024)
    assert layout.weights == 3700


def test_a_linear_without_features_is_refused():
    with pytest.raises(QtipError, match="0 x 16"):
        PackedLayout(16, 0, TrellisSpec("1mad", 2))


def test_an_embedding_with_a_bias_is_refused():
    with pytest.raises(QtipError, match="an embedding with a bias"):
        PackedLayout(16, 16, TrellisSpec("1mad", 2), bias=True, embedding=True)
