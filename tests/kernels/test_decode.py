"""Decoding: the Numba kernel against the reference, bit for bit. Nothing is summed, so nothing may differ."""

import pytest
import torch
from random_packed import RAGGED, SPECS, name, packed, table

from qtipcli_kernels import codes, packing, vectors
from qtipcli_kernels.decode import cpu, reference
from qtipcli_kernels.spec import TrellisSpec


def test_reference_puts_every_weight_in_its_place():
    """Oracle: one tile, position by position, through the tabulated code."""
    spec = TrellisSpec("3inst", 3)
    trellis = packed(spec, 32, 48)
    weight = reference.decode(trellis, spec)
    code = codes.tabulate(spec)
    states = packing.unpack(trellis[1:2, spec.words_per_tile : 2 * spec.words_per_tile], spec)[0]
    for position, place in enumerate(packing.WALK_TO_TILE.tolist()):
        assert weight[16 + place // 16, 16 + place % 16] == code[states[position], 0]


@pytest.mark.parametrize("module", [cpu, reference])
def test_worked_example_of_the_readme(module):
    """Oracle: kernels/README.md, worked out by hand there to four digits."""
    words = torch.tensor([[0x01234567, 0x89ABCDEF] * 16], dtype=torch.int64).to(torch.uint32).view(torch.int32)
    weight = module.decode(words, TrellisSpec("1mad", 4))
    assert [round(float(weight[place]), 4) for place in ((0, 0), (0, 1), (8, 0))] == [-0.2097, 1.5156, -0.2165]


@pytest.mark.parametrize("spec", SPECS, ids=name)
def test_kernel_equals_the_reference(spec):
    trellis, lut = packed(spec, *RAGGED), table(spec)
    assert torch.equal(cpu.decode(trellis, spec, lut), reference.decode(trellis, spec, lut))


@pytest.mark.parametrize("code", ["1mad", "mul1", "3inst", "mcg"])
def test_kernel_computes_every_state_of_a_computed_code(code):
    """The matrix holds each of the 2^16 states at least once, so its arithmetic is proved for all of them."""
    spec = TrellisSpec(code, 8)
    trellis = packed(spec, 1024, 1024)
    assert packing.unpack(packing.tile_words(trellis, spec), spec).unique().numel() == spec.states
    assert torch.equal(cpu.decode(trellis, spec), reference.decode(trellis, spec))


@pytest.mark.parametrize("code", ["1mad", "mul1", "3inst", "mcg"])
@pytest.mark.parametrize("integer_dot", [False, True])
def test_weights_are_the_same_with_and_without_integer_dot_products(code, integer_dot):
    if integer_dot and not vectors.HAS_INTEGER_DOT:
        pytest.skip("this processor has no AVX-512 VNNI")
    spec = TrellisSpec(code, 2)
    trellis = packed(spec, 64, 256)
    weight = torch.empty(64, 256)
    arguments = (trellis.numpy().view("uint32").reshape(-1), vectors.lookup_table(spec, None))
    cpu.decoder(spec, integer_dot)(0, 4, *arguments, cpu.np.float32(vectors.weight_scale(spec)), weight.numpy())
    assert torch.equal(weight, reference.decode(trellis, spec))


@pytest.mark.parametrize("module", [cpu, reference])
def test_strips_are_the_matrix_from_top_to_bottom(module):
    spec = TrellisSpec("3inst", 2)
    trellis = packed(spec, *RAGGED)
    seen = torch.zeros(RAGGED)
    stops = []
    for outputs, weight in module.strips(trellis, spec, None, 8):
        seen[outputs] = weight
        stops.append((outputs.start, outputs.stop))
    assert stops == [(0, 128), (128, 256), (256, 336)]
    assert torch.equal(seen, reference.decode(trellis, spec))


def test_a_table_in_float32_is_read_as_it_is():
    """A table in training is not representable in fp16; decoding must not round it."""
    spec = TrellisSpec("hyb", 4)
    lut = torch.randn(512, 2)
    trellis = packed(spec, 32, 64)
    assert torch.equal(cpu.decode(trellis, spec, lut), reference.decode(trellis, spec, lut))
