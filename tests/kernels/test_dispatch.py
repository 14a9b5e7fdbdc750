"""The custom ops: the right implementation, shapes and dtypes, gradients, fakes that torch.compile can trace."""

import pytest
import torch
from random_packed import RAGGED, SPECS, name, packed, table, x_rows

from qtipcli_kernels import codes, device, dispatch
from qtipcli_kernels.decode import reference as decode_reference
from qtipcli_kernels.matvec import cpu as matvec_cpu
from qtipcli_kernels.spec import SpecError, TrellisSpec
from qtipcli_kernels.viterbi import reference as viterbi_reference

SPEC = TrellisSpec("1mad", 2)


def fields(spec):
    return spec.code, spec.bits_per_step, spec.state_bits, spec.weights_per_step


def test_numba_serves_the_cpu_triton_the_gpus_it_runs_on_and_the_reference_the_rest(monkeypatch):
    assert dispatch.implementation("cpu") == "numba"
    assert dispatch.implementation("xpu") == "reference"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, expected in (((9, 0), "triton"), ((8, 0), "triton"), ((7, 5), "reference")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index, capability=capability: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a card")
        device._unfit_gpu.cache_clear()
        assert dispatch.implementation(torch.device("cuda", 1)) == expected
    assert "a card has compute capability 7.5" in device.why_not("cuda:1")
    device._unfit_gpu.cache_clear()


def test_what_the_reference_serves_is_said_once(monkeypatch):
    monkeypatch.setattr(dispatch, "implementation", lambda device: "reference")
    monkeypatch.setattr(device, "INTERPRETED", False)
    trellis = packed(SPEC, 16, 32)
    dispatch._say_that_it_is_slow.cache_clear()
    with pytest.warns(RuntimeWarning, match="served by the torch reference, which is right but slow: Triton") as caught:
        found = dispatch.decode(trellis, SPEC)
        dispatch.decode(trellis, SPEC)
    assert len(caught) == 1
    assert torch.equal(found, decode_reference.decode(trellis, SPEC))


@pytest.mark.parametrize("spec", SPECS, ids=name)
def test_decode_is_the_references(spec):
    trellis, lut = packed(spec, *RAGGED), table(spec)
    assert torch.equal(dispatch.decode(trellis, spec, lut), decode_reference.decode(trellis, spec, lut))


def test_encode_finds_walks_as_cheap_as_the_references():
    """Ties may be broken differently; the cost is the contract, equal but for the order of 256 float32 sums."""
    spec = TrellisSpec("hyb", 2, 10)
    code = codes.tabulate(spec, table(spec))
    tiles = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    found = viterbi_reference.distortion(tiles, dispatch.encode(tiles, spec, code), code)
    expected = viterbi_reference.distortion(tiles, viterbi_reference.encode(tiles, spec, code), code)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_matvec_keeps_leading_dimensions_and_dtype(dtype):
    trellis = packed(SPEC, 48, 64)
    x = x_rows(6, 64).reshape(2, 3, 64).to(dtype)
    y = dispatch.matvec(x, trellis, SPEC)
    assert y.shape == (2, 3, 48)
    # Computed in float32 whatever the dtype: rounded once at the end, so equal to rounding the float32 result.
    assert torch.equal(y, dispatch.matvec(x.float(), trellis, SPEC).to(dtype))
    assert dispatch.matvec(x[0, 0], trellis, SPEC).shape == (48,)
    assert dispatch.matvec(x[:0], trellis, SPEC).shape == (0, 3, 48)


def test_views_are_read_as_what_they_show():
    trellis = packed(SPEC, 96, 64)
    x = x_rows(8, 128)[::2, ::2]
    every_other = trellis[::2]
    expected = dispatch.matvec(x.contiguous(), every_other.contiguous(), SPEC)
    assert torch.equal(dispatch.matvec(x, every_other, SPEC), expected)
    assert torch.equal(dispatch.decode(every_other, SPEC), dispatch.decode(every_other.contiguous(), SPEC))


def test_many_rows_go_to_decoded_strips_within_float32_rounding(monkeypatch):
    """Oracle: the fused kernel's contract; no worse than twice torch's float32 product, against float64."""
    trellis, x = packed(SPEC, *RAGGED), x_rows(5, RAGGED[1])
    weight = decode_reference.decode(trellis, SPEC)
    monkeypatch.setattr(dispatch, "FUSED_ROWS", 4)
    monkeypatch.setattr(dispatch, "STRIP_WEIGHTS", RAGGED[1] * 16 * 4)
    monkeypatch.setattr(matvec_cpu, "matvec", None)  # must not be asked
    exact = x.double() @ weight.double().T
    plain = (x @ weight.T - exact).norm()
    assert (dispatch.matvec(x, trellis, SPEC) - exact).norm() <= 2 * plain


def test_matvec_gradient_is_the_dense_layers(monkeypatch):
    """Oracle: autograd through x @ W^T in float64; no worse than twice the same in float32. Several strips."""
    monkeypatch.setattr(dispatch, "STRIP_WEIGHTS", RAGGED[1] * 16 * 4)
    trellis, x = packed(SPEC, *RAGGED), x_rows(3, RAGGED[1])
    weight = decode_reference.decode(trellis, SPEC)
    seed = torch.randn(3, RAGGED[0], generator=torch.Generator().manual_seed(3))
    leaf = x.clone().requires_grad_()
    (dispatch.matvec(leaf, trellis, SPEC) * seed).sum().backward()
    exact = seed.double() @ weight.double()
    assert (leaf.grad - exact).norm() <= 2 * (seed @ weight - exact).norm()


def test_autocast_does_not_reach_into_the_products(monkeypatch):
    monkeypatch.setattr(dispatch, "FUSED_ROWS", 1)
    trellis, x = packed(SPEC, 48, 64), x_rows(3, 64)
    grads = []
    for enabled in (False, True):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = dispatch.matvec(leaf, trellis, SPEC)
            y.square().sum().backward()
        grads.append((y.detach(), leaf.grad))
    assert all(torch.equal(plain, under) for plain, under in zip(*grads, strict=True))


def test_hadamard_gradient_is_the_transpose():
    leaf = torch.randn(2, 48, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: dispatch.hadamard(x, 48), leaf)
    assert torch.autograd.gradcheck(lambda x: dispatch.hadamard(x, 16, transpose=True), leaf)


def test_hadamard_returns_a_tensor_of_its_own():
    x = torch.randn(3, 5)
    same = dispatch.hadamard(x, 1)
    assert torch.equal(same, x)
    assert same.data_ptr() != x.data_ptr()


def test_ops_fulfil_torchs_contract():
    """Oracle: torch.library.opcheck, which runs schema, fakes, autograd registration and tracing against the real op."""
    spec = TrellisSpec("hyb", 4)
    trellis, lut = packed(spec, 32, 48), table(spec)
    x = x_rows(2, 48).requires_grad_()
    torch.library.opcheck(torch.ops.qtip.decode, (trellis, lut, *fields(spec)))
    torch.library.opcheck(torch.ops.qtip.matvec, (x, trellis, lut, *fields(spec)))
    torch.library.opcheck(torch.ops.qtip.matvec_grad, (x_rows(2, 32), trellis, lut, *fields(spec)))
    torch.library.opcheck(torch.ops.qtip.hadamard, (x, 48, False))
    short = TrellisSpec("1mad", 2, 8)
    torch.library.opcheck(torch.ops.qtip.encode, (torch.randn(2, 256), codes.tabulate(short), *fields(short), False))


def test_compiled_layer_is_the_eager_one():
    """The whole layer in one graph, forwards and backwards."""
    trellis = packed(SPEC, 48, 64)

    def layer(x):
        return dispatch.hadamard(dispatch.matvec(dispatch.hadamard(x, 64), trellis, SPEC), 16, transpose=True)

    eager, traced = (x_rows(2, 64).requires_grad_() for _ in range(2))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected, found = layer(eager), compiled(traced)
    assert torch.equal(found, expected)
    expected.sum().backward()
    found.sum().backward()
    assert torch.equal(traced.grad, eager.grad)


def test_without_a_table_the_default_one_is_read():
    spec = TrellisSpec("lut", 2, 8)
    trellis, x = packed(spec, 32, 32), x_rows(1, 32)
    assert torch.equal(dispatch.matvec(x, trellis, spec), dispatch.matvec(x, trellis, spec, codes.default_lut(spec)))


def test_what_does_not_fit_is_refused_by_name():
    trellis = packed(SPEC, 48, 64)
    with pytest.raises(SpecError, match=r"\[\.\.\., 64\]"):
        dispatch.matvec(torch.zeros(2, 48), trellis, SPEC)
    with pytest.raises(SpecError, match=r"torch\.int64"):
        dispatch.matvec(torch.zeros(2, 64, dtype=torch.int64), trellis, SPEC)
    with pytest.raises(SpecError, match=r"I/16 \* 24\]"):
        dispatch.decode(trellis[:, :-1], TrellisSpec("1mad", 3))
    with pytest.raises(SpecError, match=r"int32 .* not torch\.float32"):
        dispatch.decode(trellis.float(), SPEC)
    with pytest.raises(SpecError, match=r"\[N, 256\]"):
        dispatch.encode(torch.zeros(2, 255), SPEC)
    with pytest.raises(SpecError, match="blocks of 128"):
        dispatch.hadamard(torch.zeros(2, 64), 128)
    with pytest.raises(SpecError, match="bfloat16"):
        dispatch.hadamard(torch.zeros(2, 64, dtype=torch.bfloat16), 64)
    spec = TrellisSpec("hyb", 4)
    with pytest.raises(SpecError, match=r"\(512, 2\)"):
        dispatch.matvec(torch.zeros(1, 32), packed(spec, 32, 32), spec, torch.zeros(2, 512))
