"""Codes against scalar definitions in plain Python integers and IEEE halves, written from the papers and not from codes.py."""

import math
import struct

import pytest
import torch

from qtipcli_kernels import codes
from qtipcli_kernels.spec import SpecError, TrellisSpec


def byte_sum(x):
    return sum(x.to_bytes(4, "little"))


def half(bits):
    return struct.unpack("<e", struct.pack("<H", bits))[0]


def half_pair(x):
    r = (x & 0x8FFF8FFF) ^ 0x3B603B60
    # The exact sum of two halves fits a double; packing it as a half rounds once, ties to even.
    return struct.unpack("<e", struct.pack("<e", half(r >> 16) + half(r & 0xFFFF)))[0]


SCALAR = {
    "1mad": lambda s: byte_sum((34038481 * s + 76625530) % 2**32),
    "mul1": lambda s: byte_sum((0x83DCD12D * s) % 2**32),
    "3inst": lambda s: half_pair((89226354 * s + 64248484) % 2**32),
    "mcg": lambda s: half_pair((0xCBAC1FED * s) % 2**32),
}


@pytest.mark.parametrize("code", ["3inst", "mcg"])
def test_half_sums_equal_the_scalar_definition_on_every_state(code):
    expected = torch.tensor([SCALAR[code](s) for s in range(1 << 16)], dtype=torch.float32)
    assert torch.equal(codes.tabulate(TrellisSpec(code, 2))[:, 0], expected)


@pytest.mark.parametrize("code", ["1mad", "mul1"])
def test_byte_sums_equal_the_scalar_definition_on_every_state(code):
    """Exact sums; the factor is applied in float32, so within half a unit in the last place of the exact quotient, doubled."""
    expected = torch.tensor([(SCALAR[code](s) - 510) / 147.800537 for s in range(1 << 16)], dtype=torch.float64)
    found = codes.tabulate(TrellisSpec(code, 2))[:, 0].double()
    assert torch.equal((found * 147.800537 + 510).round(), (expected * 147.800537 + 510).round())
    torch.testing.assert_close(found, expected, rtol=2**-23, atol=0)


@pytest.mark.parametrize("code", ["hyb", "hyb2"])
def test_hybrid_equals_the_scalar_definition_on_every_state(code):
    """Oracle: h = s^2 + s, bits 14..6 index the table, bit 15 flips entry 0; hyb2: bit 31 flips entry 1. Nothing is summed."""
    lut = torch.randn(512, 2, generator=torch.Generator().manual_seed(0)).to(torch.float16)
    rows = lut.tolist()
    expected = []
    for s in range(1 << 16):
        h = (s * s + s) % 2**32
        first, second = rows[(h // 2**6) % 512]
        expected.append((-first if h // 2**15 % 2 else first, -second if code == "hyb2" and h // 2**31 else second))
    assert torch.equal(codes.tabulate(TrellisSpec(code, 4), lut), torch.tensor(expected))


@pytest.mark.parametrize(("code", "rms"), [("1mad", 1.0001), ("3inst", 1.24371)])
def test_root_mean_square_over_all_states_is_the_published_one(code, rms):
    """Oracle: method.md, section 2, to its last digit."""
    values = codes.tabulate(TrellisSpec(code, 2)).double()
    digits = len(str(rms).split(".")[1])
    assert round(float(values.square().mean().sqrt()), digits) == rms


def test_short_states_are_the_first_states():
    for code in ("1mad", "3inst", "mul1", "mcg"):
        short, full = codes.tabulate(TrellisSpec(code, 2, 10)), codes.tabulate(TrellisSpec(code, 2, 16))
        assert torch.equal(short, full[: 1 << 10])


@pytest.mark.parametrize("weights_per_step", [1, 2])
def test_lut_code_reads_the_row_of_its_state(weights_per_step):
    spec = TrellisSpec("lut", 3, 9, weights_per_step)
    lut = torch.randn(512, weights_per_step)
    states = torch.tensor([[0, 511], [7, 300]])
    assert torch.equal(codes.values(states, spec, lut), lut[states])


def test_default_hybrid_table_has_the_papers_scale_and_is_folded():
    """Scale sqrt(15/16) within fp16's rounding of 1,024 entries; entry 0 is what the sign bit flips, so never negative."""
    lut = codes.default_lut(TrellisSpec("hyb", 4)).double()
    assert math.isclose(float(lut.square().mean().sqrt()), math.sqrt(15 / 16), rel_tol=2**-11)
    assert bool((lut[:, 0] > 0).all())


def test_a_table_of_another_shape_is_refused_by_both_shapes():
    with pytest.raises(SpecError, match=r"\(512, 1\).*\(512, 2\)"):
        codes.tabulate(TrellisSpec("hyb", 4), torch.zeros(512, 1))
