"""The packed product: against float64, no worse than twice torch's own float32 product; exact where nothing is summed."""

from functools import partial

import pytest
import torch
from random_packed import RAGGED, SPECS, name, packed, table, x_rows
from torch.nn import functional

from qtipcli_kernels import threads, vectors
from qtipcli_kernels.decode.reference import decode
from qtipcli_kernels.matvec import cpu, reference
from qtipcli_kernels.spec import TrellisSpec

FLOAT32_ERRORS = 2
"""House rule: no worse than twice plain torch in the same dtype, against float64."""


def errors(found, x, weight):
    """Largest and mean-square error against float64, of `found` and of torch's float32 product."""
    exact = x.double() @ weight.double().T
    return [((y - exact).abs().max(), (y - exact).norm()) for y in (found, functional.linear(x, weight))]


@pytest.mark.parametrize("module", [cpu, reference])
@pytest.mark.parametrize("spec", SPECS, ids=name)
def test_product_is_as_accurate_as_float32(module, spec):
    trellis, lut, x = packed(spec, *RAGGED), table(spec), x_rows(1, RAGGED[1])
    found, plain = errors(module.matvec(x, trellis, spec, lut), x, decode(trellis, spec, lut))
    assert found[0] <= FLOAT32_ERRORS * plain[0]
    assert found[1] <= FLOAT32_ERRORS * plain[1]


@pytest.mark.parametrize("batch", [2, 3, 8, 16, 21])
def test_product_of_several_rows_is_as_accurate_as_float32(batch):
    """Long rows, so that they are summed in chunks, and batches that the compiled row counts do not divide."""
    spec = TrellisSpec("3inst", 2)
    trellis, x = packed(spec, 336, 4112), x_rows(batch, 4112)
    found, plain = errors(cpu.matvec(x, trellis, spec), x, decode(trellis, spec))
    assert found[1] <= FLOAT32_ERRORS * plain[1]


def test_inputs_with_a_large_common_part_lose_no_accuracy():
    """Byte sums have a mean of 510: a kernel that subtracted it at the end would lose digits here."""
    spec = TrellisSpec("1mad", 2)
    trellis, x = packed(spec, 256, 4096), x_rows(1, 4096) + 100
    found, plain = errors(cpu.matvec(x, trellis, spec), x, decode(trellis, spec))
    assert found[1] <= FLOAT32_ERRORS * plain[1]


@pytest.mark.parametrize("spec", SPECS, ids=name)
def test_unit_vectors_give_the_columns_exactly(spec):
    """One product and zeros: nothing is rounded, so every weight meets the right input and goes to the right output."""
    outputs, inputs = 48, 48
    trellis, lut = packed(spec, outputs, inputs), table(spec)
    columns = torch.cat([cpu.matvec(unit, trellis, spec, lut) for unit in torch.eye(inputs).split(1)])
    assert torch.equal(columns, decode(trellis, spec, lut).T)


def test_rows_do_not_depend_on_each_other():
    """A token's result must not change with what else is in the batch: equal bits, at every compiled row count."""
    spec = TrellisSpec("3inst", 2)
    trellis, x = packed(spec, *RAGGED), x_rows(19, RAGGED[1])
    alone = torch.cat([cpu.matvec(row, trellis, spec) for row in x.split(1)])
    for batch in (2, 3, 5, 16, 19):
        assert torch.equal(cpu.matvec(x[:batch].contiguous(), trellis, spec), alone[:batch])


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_number_of_threads_does_not_change_a_bit(monkeypatch, count):
    spec = TrellisSpec("1mad", 2)
    trellis, x = packed(spec, 1040, 2064), x_rows(1, 2064)
    expected = cpu.matvec(x, trellis, spec)
    monkeypatch.setattr(threads, "thread_count", lambda: count)
    threads._pool.cache_clear()
    assert torch.equal(cpu.matvec(x, trellis, spec), expected)
    monkeypatch.undo()
    threads._pool.cache_clear()


@pytest.mark.parametrize("code", ["1mad", "mul1", "3inst", "mcg"])
def test_integer_dot_products_do_not_change_a_bit(monkeypatch, code):
    """Oracle: the kernel without them. Both compute the same integers."""
    if not vectors.HAS_INTEGER_DOT:
        pytest.skip("this processor has no AVX-512 VNNI")
    spec = TrellisSpec(code, 2)
    trellis, x = packed(spec, *RAGGED), x_rows(1, RAGGED[1])
    with_dot = cpu.matvec(x, trellis, spec)
    monkeypatch.setattr(cpu, "product", partial(cpu.product, integer_dot=False))
    assert torch.equal(cpu.matvec(x, trellis, spec), with_dot)


def test_no_rows_give_no_rows():
    spec = TrellisSpec("1mad", 2)
    assert cpu.matvec(torch.zeros(0, 32), packed(spec, 48, 32), spec).shape == (0, 48)
