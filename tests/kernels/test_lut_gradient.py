"""The gradient of the table, on the CPU and in plain torch, against autograd through the codes' definition.

Where gradients are small whole numbers every sum of them is exact, so that the oracle's float32 sums are the truth and any
order of addition must give the same bits.
"""

import pytest
import torch
from random_packed import RAGGED, SPECS, name, packed, table, x_rows

from qtipcli_kernels import codes, dispatch, packing
from qtipcli_kernels.decode import gradient
from qtipcli_kernels.spec import SpecError, TrellisSpec

TABLED = [spec for spec in SPECS if codes.lut_shape(spec)]
IMPLEMENTATIONS = {"numba": gradient.lut_grad_cpu, "torch": gradient.lut_grad}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def whole(*shape: int, seed: int = 0) -> torch.Tensor:
    """float32 whole numbers from -3 to 3."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).to(torch.float32)


def decoded(trellis: torch.Tensor, spec: TrellisSpec, lut: torch.Tensor) -> torch.Tensor:
    """The dense matrix by definition, differentiable by autograd."""
    states = packing.unpack(packing.tile_words(trellis, spec), spec)
    tiles = codes.values(states, spec, lut).reshape(len(states), -1)
    return packing.matrix_from_tiles(tiles, *RAGGED)


def leaf(spec: TrellisSpec, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return table(spec).to(dtype).requires_grad_()


@pytest.mark.parametrize("spec", TABLED, ids=name)
@pytest.mark.parametrize("tile_rows", [4, 1000])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_it_is_autograds_through_the_definition(spec, tile_rows, implementation, monkeypatch):
    monkeypatch.setattr(gradient, "PIECE_WEIGHTS", 1000)  # several pieces, as in matrices of a real size
    trellis, gradient_OI, lut = packed(spec, *RAGGED), whole(*RAGGED), leaf(spec)
    decoded(trellis, spec, lut).backward(gradient_OI)
    found = IMPLEMENTATIONS[implementation](lambda outputs: gradient_OI[outputs], trellis, spec, tile_rows)
    assert found.dtype == torch.float32
    assert torch.equal(found, lut.grad)


@pytest.mark.parametrize("spec", TABLED, ids=name)
def test_it_flows_through_both_ops(spec, monkeypatch):
    monkeypatch.setattr(dispatch, "STRIP_WEIGHTS", RAGGED[1] * 16 * 4)
    trellis, x, upstream = packed(spec, *RAGGED), whole(2, 3, RAGGED[1]), whole(2, 3, RAGGED[0], seed=1)
    expected, product, decode = leaf(spec), leaf(spec), leaf(spec)
    weight = decoded(trellis, spec, expected)
    (x @ weight.T).backward(upstream)
    dispatch.matvec(x, trellis, spec, product).backward(upstream)
    gradient_OI = torch.einsum("abo,abi->oi", upstream, x)
    dispatch.decode(trellis, spec, decode).backward(gradient_OI)
    assert torch.equal(product.grad, expected.grad)
    assert torch.equal(decode.grad, expected.grad)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_sums_are_rounded_once(implementation):
    """Oracle: the product is linear in the table, so one entry's gradient is the sum, in float64, over the weights it makes."""
    spec = TrellisSpec("hyb", 4)
    trellis = packed(spec, *RAGGED)
    gradient_OI = torch.randn(RAGGED, generator=torch.Generator().manual_seed(5)) * 1e-20  # the size must not matter
    found = IMPLEMENTATIONS[implementation](lambda outputs: gradient_OI[outputs], trellis, spec, 4)
    for entry in (0, 100, 1023):
        unit = torch.zeros(1024)
        unit[entry] = 1
        exact = (dispatch.decode(trellis, spec, unit.reshape(512, 2)).double() * gradient_OI.double()).sum()
        # One rounding to float32, 2^-24 of the result; what the fixed point loses lies far below.
        assert abs(found.reshape(-1)[entry] - exact) <= 2**-24 * abs(exact) + 1e-8 * gradient_OI.abs().max()


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_the_number_of_threads_changes_nothing(threads, monkeypatch):
    spec = TrellisSpec("hyb", 4)
    trellis, gradient_OI = packed(spec, *RAGGED), torch.randn(RAGGED, generator=torch.Generator().manual_seed(5))
    monkeypatch.setattr(gradient, "PIECE_WEIGHTS", 1000)
    before = gradient.lut_grad_cpu(lambda outputs: gradient_OI[outputs], trellis, spec, 4)
    monkeypatch.setattr("qtipcli_kernels.threads.thread_count", lambda: threads)
    for _ in range(5):
        assert torch.equal(gradient.lut_grad_cpu(lambda outputs: gradient_OI[outputs], trellis, spec, 4), before)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_stays_visible(implementation, bad):
    spec = TrellisSpec("hyb", 4)
    trellis, gradient_OI = packed(spec, *RAGGED), torch.zeros(RAGGED)
    gradient_OI[17, 33] = bad
    found = IMPLEMENTATIONS[implementation](lambda outputs: gradient_OI[outputs], trellis, spec, 4)
    assert not found.isfinite().all()


def test_a_gradient_of_zeros_is_zero():
    spec, zeros = TrellisSpec("hyb", 4), torch.zeros(RAGGED)
    for implementation in IMPLEMENTATIONS.values():
        assert not implementation(lambda outputs: zeros[outputs], packed(spec, *RAGGED), spec, 4).any()


def test_a_float32_table_is_not_rounded_and_an_fp16_one_gets_its_gradient_in_fp16():
    spec = TrellisSpec("hyb", 4)
    trellis, x = packed(spec, *RAGGED), x_rows(3, RAGGED[1])
    master = torch.randn(512, 2, generator=torch.Generator().manual_seed(6)).requires_grad_()
    with torch.no_grad():
        exact = x.double() @ decoded(trellis, spec, master).double().T
        plain = (x @ decoded(trellis, spec, master).T - exact).norm()
        # Rounding the table to fp16 moves every weight by 2^-12 of its size, a thousand times this bound.
        assert (dispatch.matvec(x, trellis, spec, master) - exact).norm() <= 2 * plain
    assert torch.equal(dispatch.decode(trellis, spec, master), decoded(trellis, spec, master))
    half = leaf(spec, torch.float16)
    full = leaf(spec)
    for lut in (half, full):
        dispatch.matvec(x, trellis, spec, lut).sum().backward()
    assert half.grad.dtype == torch.float16
    assert torch.equal(half.grad, full.grad.to(torch.float16))


@pytest.mark.parametrize("needed", [("x",), ("lut",), ("x", "lut")], ids="+".join)
def test_only_what_is_asked_for_is_computed(needed, monkeypatch):
    spec = TrellisSpec("hyb", 4)
    trellis, lut, x = packed(spec, *RAGGED), table(spec).float(), whole(2, RAGGED[1])
    lut.requires_grad_("lut" in needed)
    x.requires_grad_("x" in needed)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tuple(tensor.shape)) or tensor, lambda it: it):
        product = dispatch.matvec(x, trellis, spec, lut)
    # x, many times the size of the rest, is kept for the table alone.
    assert (tuple(x.shape) in saved) == ("lut" in needed)
    product.sum().backward()
    assert (x.grad is not None) == ("x" in needed)
    assert (lut.grad is not None) == ("lut" in needed)


def test_it_compiles_into_one_graph_both_ways():
    spec = TrellisSpec("hyb", 4)
    trellis, x = packed(spec, 48, 64), whole(2, 64)
    eager, traced = leaf(spec), leaf(spec)
    dispatch.matvec(x, trellis, spec, eager).sum().backward()
    compiled = torch.compile(lambda lut: dispatch.matvec(x, trellis, spec, lut), fullgraph=True, backend="aot_eager")
    compiled(traced).sum().backward()
    assert torch.equal(traced.grad, eager.grad)


def test_ops_fulfil_torchs_contract():
    """Oracle: torch.library.opcheck, as in test_dispatch."""
    spec = TrellisSpec("hyb", 4)
    fields = (spec.code, spec.bits_per_step, spec.state_bits, spec.weights_per_step)
    trellis = packed(spec, 32, 48)
    torch.library.opcheck(torch.ops.qtip.matvec, (whole(2, 48).requires_grad_(), trellis, leaf(spec), *fields))
    torch.library.opcheck(torch.ops.qtip.decode, (trellis, leaf(spec), *fields))
    torch.library.opcheck(torch.ops.qtip.lut_grad, (whole(2, 32), whole(2, 48), trellis, *fields))
    torch.library.opcheck(torch.ops.qtip.decode_grad, (whole(32, 48), trellis, *fields))


def test_a_computed_code_has_no_table_to_train():
    with pytest.raises(SpecError, match="1mad reads no table"):
        gradient.entry_numbers(TrellisSpec("1mad", 2))


@pytest.mark.skipif(DEVICE == "cpu", reason="additions run in an open order on a GPU only")
def test_it_is_the_same_bits_every_time_on_a_gpu():
    spec = TrellisSpec("hyb", 4)
    trellis = packed(spec, 1024, 4096).to(DEVICE)
    x, upstream = torch.randn(8, 4096, device=DEVICE), torch.randn(8, 1024, device=DEVICE)
    first, *others = (torch.ops.qtip.lut_grad(upstream, x, trellis, "hyb", 4, 16, 2) for _ in range(5))
    assert all(torch.equal(first, other) for other in others)
