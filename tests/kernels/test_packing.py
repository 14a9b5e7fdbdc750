"""Packing against vectors worked out by hand and against the fragment layout of the PTX manual.

These vectors define FORMAT_VERSION 1: where one of them has to change, the format has changed.
"""

import pytest
import torch

from qtipcli_kernels import packing
from qtipcli_kernels.spec import SpecError, TrellisSpec


def words_of(hexadecimal):
    return torch.tensor([[int(word, 16) for word in hexadecimal.split()]], dtype=torch.int64).to(torch.uint32).view(torch.int32)


def test_vectors_belong_to_this_format_version():
    assert packing.FORMAT_VERSION == 1


def test_nibbles_by_hand():
    """V = 1, kV = 4, L = 16. The ring's nibbles are 0 1 2 ... F, sixteen times over; a state is four of them, first highest."""
    spec = TrellisSpec("1mad", 4)
    words = words_of("01234567 89ABCDEF " * 16)
    digits = "0123456789ABCDEF" * 17
    states = torch.tensor([[int(digits[t : t + 4], 16) for t in range(256)]], dtype=torch.int32)
    assert states[0, :2].tolist() == [0x0123, 0x1234]
    assert states[0, -1] == 0xF012  # the last window wraps
    assert torch.equal(packing.pack(states, spec), words)
    assert torch.equal(packing.unpack(words, spec), states)


def test_octal_digits_by_hand():
    """V = 2, kV = 3, L = 9. The ring's digits are 0 1 ... 7 in three bits each: 24 bits, hexadecimal 053977."""
    spec = TrellisSpec("hyb", 3, 9)
    words = words_of("05397705 39770539 77053977 " * 4)
    digits = "01234567" * 17
    states = torch.tensor([[int(digits[t : t + 3], 8) for t in range(128)]], dtype=torch.int32)
    assert torch.equal(packing.pack(states, spec), words)
    assert torch.equal(packing.unpack(words, spec), states)


def test_two_bits_by_hand():
    """V = 1, kV = 2, L = 16. A single one at ring bit 31: window t starts at bit 2 t, so it shows as 2^(15 - 31 + 2 t)."""
    spec = TrellisSpec("3inst", 2)
    words = words_of("00000001" + " 00000000" * 15)
    states = torch.zeros(1, 256, dtype=torch.int32)
    for t in range(8, 16):
        states[0, t] = 1 << (2 * t - 16)
    assert torch.equal(packing.pack(states, spec), words)
    assert torch.equal(packing.unpack(words, spec), states)


def test_the_walk_follows_the_fragment_of_the_matrix_instruction():
    """Oracle: PTX ISA, mma.m16n8k16, operand A: lane 4 (row % 8) + (column % 8) // 2; column half, row half, parity."""
    for row in range(16):
        for column in range(16):
            lane = 4 * (row % 8) + (column % 8) // 2
            position = 8 * lane + 4 * (column // 8) + 2 * (row // 8) + column % 2
            assert packing.WALK_TO_TILE[position] == 16 * row + column


def test_tiles_run_along_the_rows_of_tiles():
    weight = torch.arange(32 * 48).reshape(32, 48)
    tiles = packing.tiles_from_matrix(weight)
    assert tiles.shape == (6, 256)
    assert [int(tile[0]) for tile in tiles] == [0, 16, 32, 16 * 48, 16 * 48 + 16, 16 * 48 + 32]
    assert torch.equal(packing.matrix_from_tiles(tiles, 32, 48), weight)


@pytest.mark.parametrize("state_bits", [8, 11, 16])
@pytest.mark.parametrize("weights_per_step", [1, 2])
def test_every_ring_unpacks_to_a_walk_that_packs_to_it(state_bits, weights_per_step):
    draw = torch.Generator().manual_seed(0)
    for bits_per_step in range(weights_per_step, 9):
        spec = TrellisSpec("lut", bits_per_step, state_bits, weights_per_step)
        words = torch.randint(-(2**31), 2**31, (3, spec.words_per_tile), dtype=torch.int64, generator=draw).to(torch.int32)
        states = packing.unpack(words, spec)
        assert states.shape == (3, spec.steps)
        assert int(states.min()) >= 0
        assert int(states.max()) < spec.states
        assert torch.equal(packing.pack(states, spec), words)


def test_what_is_no_walk_is_refused_where_it_breaks():
    spec = TrellisSpec("1mad", 2)
    states = packing.unpack(torch.zeros(2, spec.words_per_tile, dtype=torch.int32), spec)
    states[1, 100] = 1 << 3
    with pytest.raises(SpecError, match=r"tile 1 .* step 99"):
        packing.pack(states, spec)


def test_shapes_that_do_not_fit_are_refused():
    spec = TrellisSpec("1mad", 2)
    with pytest.raises(SpecError, match="256 steps"):
        packing.pack(torch.zeros(1, 128, dtype=torch.int32), spec)
    with pytest.raises(SpecError, match="16 words"):
        packing.unpack(torch.zeros(1, 8, dtype=torch.int32), spec)
    with pytest.raises(SpecError, match="multiples of 16"):
        packing.tiles_from_matrix(torch.zeros(16, 20))
