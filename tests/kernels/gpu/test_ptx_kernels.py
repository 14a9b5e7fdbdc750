"""The PTX emulator on kernels that Triton compiled, for two GPUs: each result against torch."""

import compiled
import ptx
import pytest
import torch

TARGETS = ("sm_80", "sm_90")


@pytest.fixture(scope="module", params=TARGETS)
def kernels(request):
    """name -> kernel; compiled for all targets at once, in a process without the interpreter."""
    every = compiled.kernels("example_kernels", TARGETS)
    return {name: kernel for (name, target), kernel in every.items() if target == request.param}


def unset(*shape, dtype=torch.float32):
    return torch.full(shape, -1 if dtype == torch.int32 else float("nan"), dtype=dtype)


@pytest.mark.parametrize(("name", "programs", "dtype"), [("add", 8, torch.float32), ("add bf16", 2, torch.bfloat16)])
def test_addition_under_a_mask(kernels, name, programs, dtype):
    x, y, out = torch.randn(1000).to(dtype), torch.randn(1000).to(dtype), unset(1000, dtype=dtype)
    kernels[name].launch((programs,), x, y, out, 1000)
    assert torch.equal(out, x + y)


def test_a_missing_mask_is_found(kernels):
    x, y, out = torch.randn(1000), torch.randn(1000), unset(1000)
    with pytest.raises(ptx.MemoryAccessError, match="which has 4000"):
        kernels["add unmasked"].launch((8,), x, y, out, 1000)


@pytest.mark.parametrize("name", ["dot 16 fp16", "dot 32 fp16", "dot 32 bf16"])
def test_products_of_matrices(kernels, name):
    """Five tiles: a loop, pipelined by asynchronous copies in the larger one. Tolerance: the rounding of five float32 sums."""
    dtype = torch.bfloat16 if name.endswith("bf16") else torch.float16
    size, inner = (32, 16) if dtype == torch.bfloat16 else (int(name.split()[1]),) * 2
    a, b, out = torch.randn(5, size, inner).to(dtype), torch.randn(5, inner, size).to(dtype), unset(size, size)
    report = kernels[name].launch((1,), a, b, out, 5)
    exact = (a.double() @ b.double()).sum(0)
    assert (out - exact).abs().max() <= 5 * 2**-24 * exact.abs().max()
    assert report.by_opcode["mma"] == 5 * (size // 16) * (size // 8) * (inner // 16)


def test_products_of_bytes_are_exact(kernels):
    a, b = (torch.randint(-128, 128, shape, dtype=torch.int8) for shape in ((3, 16, 32), (3, 32, 16)))
    out = unset(16, 16, dtype=torch.int32)
    kernels["dot 16 i8"].launch((1,), a, b, out, 3)
    assert torch.equal(out, (a.long() @ b.long()).sum(0).int())


def test_reductions_over_lanes_and_warps(kernels):
    """Tolerance: torch's own float32 softmax adds in another order."""
    x, out = torch.randn(3, 200).half(), unset(3, 200)
    kernels["softmax"].launch((3,), x, out, 200)
    torch.testing.assert_close(out, torch.softmax(x.float(), -1), rtol=1e-6, atol=1e-8)


def test_a_loop_whose_length_differs_between_programs(kernels):
    x, out = torch.randint(-999, 999, (16, 16), dtype=torch.int32), unset(2, 16, 16, dtype=torch.int32)
    kernels["scan"].launch((2,), x, out, 2)
    for program in range(2):
        expected = x
        for turn in range(2 + program):
            expected = torch.cumsum(expected.T, 0).int() ^ turn
        assert torch.equal(out[program], expected)


def test_a_gluon_kernel(kernels):
    """Layouts chosen by hand, one conversion through shared memory. Tolerance: the rounding of a float32 sum of 16."""
    if "gluon dot" not in kernels:
        pytest.skip("this Triton is too old for the Gluon kernel")
    a, b, out = torch.randn(16, 16).half(), torch.randn(16, 16).half(), unset(16, 16)
    kernels["gluon dot"].launch((1,), a, b, out)
    torch.testing.assert_close(out, (a.double() @ b.double()).float(), rtol=0, atol=1e-5)
