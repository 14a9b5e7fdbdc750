"""The fused transforms on a GPU against the definition in float64.

Oracle: reference.hadamard, or for blocks whose matrix would not fit, two products with its Kronecker factors. Tolerance: no
worse than twice plain torch in float32, taken by the factors too, which is more accurate than by the matrix.
"""

from functools import lru_cache

import compiled
import pytest
import torch

from qtipcli_kernels.device import INTERPRETED, DeviceError
from qtipcli_kernels.fragments import fragments
from qtipcli_kernels.hadamard import gpu, reference
from qtipcli_kernels.hadamard.factor import factor, sylvester
from qtipcli_kernels.spec import SpecError

FLOAT32_ERRORS = 2
"""House rule: no worse than twice plain torch in the same dtype, against float64."""

LARGEST_MATRIX = 2048

HALF_UNIT = 2.0**-11
"""fp16's rounding of a normal number, relative; half a denormal step is 2^-25."""

BLOCKS = (1, 2, 16, 48, 64, 208, 576, 896, 1536, 2048, 3584, 4096)
"""Powers of two and both Paley constructions; one slab of Q_M, one share of a block, and several."""

LARGE_BLOCKS = (4544, 4864, 5632, 8192, 9728, 11008, 14336, 17408, 18944, 24576, 25600, 28672, 29568, 32768)
"""Intermediate sizes of released models, and what folds a power of two and an M of 12."""

ON_GPU = torch.cuda.is_available()
SIZES = BLOCKS + (LARGE_BLOCKS if ON_GPU else (14336, 16384))


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@lru_cache(maxsize=4)
def factors(block):
    parts = factor(block)
    right = min(parts.power_of_two, 256)
    return torch.kron(parts.dense, sylvester(parts.power_of_two // right)), sylvester(right)


def by_factors(x, block, transpose):
    """The transform as two products in x's dtype, on the CPU."""
    left, right = (matrix.to(x.dtype) for matrix in factors(block))
    return ((left.T if transpose else left) @ (x.reshape(-1, len(left), len(right)) @ right)).reshape(x.shape)


def exact(x, block, transpose=False):
    transform = reference.hadamard if block <= LARGEST_MATRIX else by_factors
    return transform(x.double(), block, transpose)


def assert_as_accurate(found, plain, expected):
    """found no worse than twice `plain`, row by row, so that a wrong row does not hide behind the others."""
    error, allowed = ((y.double().cpu() - expected).norm(dim=-1) for y in (found, plain))
    assert (error <= FLOAT32_ERRORS * allowed).all(), (error / allowed).max()


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("block", SIZES)
def test_one_row_of_every_size(block, transpose, device):
    x = randn(1, block)
    found = gpu.hadamard(x.to(device), block, transpose)
    assert_as_accurate(found, by_factors(x, block, transpose), exact(x, block, transpose))


@pytest.mark.parametrize("rows", [3, 17] + ON_GPU * [16, 130])
@pytest.mark.parametrize(("block", "blocks"), [(16, 1), (48, 3), (64, 5), (128, 12), (208, 2), (576, 1), (944, 1), (2048, 1)])
def test_rows_and_blocks_that_fill_no_program(block, blocks, rows, device):
    """17 rows take the plan for many rows, several of them in a program."""
    x = randn(rows, block * blocks)
    found = gpu.hadamard(x.to(device), block)
    assert_as_accurate(found, by_factors(x, block, False), exact(x, block))


@pytest.mark.skipif(not ON_GPU, reason="minutes in the interpreter")
@pytest.mark.parametrize("block", [896, 1536, *LARGE_BLOCKS])
def test_many_rows_of_the_large_sizes(block, device):
    x = randn(40, block)
    found = gpu.hadamard(x.to(device), block, True)
    assert_as_accurate(found, by_factors(x, block, True), exact(x, block, True))


def test_rows_longer_than_a_program_holds(device):
    """Blocks of 128 beyond LARGEST_TILE: several programs a row, and the scale of rotate_in is for all of it."""
    x, scale = randn(2, 72 * 128 - 8) * 1e6, randn(72 * 128 - 8, seed=1).half()
    x[0, :5000] = 0
    rotated, row_scale = gpu.rotate_in(x.to(device), scale.to(device), 72 * 128, 128)
    check_rotated(rotated, row_scale, x, scale, 128)


@pytest.mark.parametrize("block", [64, 208])
def test_the_transpose_undoes_it(block, device):
    x = randn(2, 3, block * 2)
    there = gpu.hadamard(x.to(device), block)
    assert there.shape == x.shape
    back = gpu.hadamard(there, block, transpose=True).cpu()
    # Two transforms of N(0, 1): a few units in the last place of the largest values.
    torch.testing.assert_close(back, x, rtol=0, atol=16 * 2.0**-22)


def test_rows_that_are_not_contiguous(device):
    x = randn(3, 96, 5)
    for strided in (x[..., 0], x[:, 16:64, 0].T.contiguous().T, randn(3, 200)[:, 7:71]):
        found = gpu.hadamard(strided.to(device)[:, :32], 16).cpu()
        torch.testing.assert_close(found.double(), exact(strided[:, :32], 16), rtol=0, atol=2.0**-20)


def padded_product(x, scale, padded, dtype):
    """pad(scale * x), every factor exact in `dtype`."""
    return torch.nn.functional.pad(x.to(dtype) * scale.to(dtype), (0, padded - x.shape[1]))


def check_rotated(rotated, row_scale, x, scale, block):
    """The exact transform rounded to fp16, up to what plain torch's float32 is off by; row_scale by its definition."""
    rotated, row_scale = rotated.cpu().double(), row_scale.cpu().double()[:, None]
    expected = exact(padded_product(x, scale, rotated.shape[1], torch.float64), block) / row_scale
    plain = by_factors(padded_product(x, scale, rotated.shape[1], torch.float32), block, False) / row_scale
    rounding = FLOAT32_ERRORS * (plain - expected).abs().amax(1, keepdim=True)
    assert ((rotated - expected).abs() <= HALF_UNIT * expected.abs() + rounding + 2.0**-25).all()
    mantissa, _ = torch.frexp(row_scale)
    assert (mantissa == 0.5).all()
    # N times the root mean square. What float32 loses of it can only show at the ends.
    size = expected.norm(dim=1) * expected.shape[1] ** 0.5
    assert (size >= 2.0**14 * (1 - 2.0**-16)).all()
    assert (size <= 2.0**15 * (1 + 2.0**-16)).all()


@pytest.mark.parametrize(("rows", "dtype"), [(1, torch.float16), (17, torch.bfloat16), (3, torch.float32)])
@pytest.mark.parametrize(("inputs", "padded", "block"), [(1000, 1024, 1024), (200, 208, 208), (250, 256, 64)])
def test_rotate_in_is_the_transform_rounded_to_fp16(inputs, padded, block, rows, dtype, device):
    x, scale = (randn(rows, inputs) * 3).to(dtype), randn(inputs, seed=1).half()
    rotated, row_scale = gpu.rotate_in(x.to(device), scale.to(device), padded, block)
    assert rotated.dtype == torch.float16
    assert row_scale.dtype == torch.float32
    check_rotated(rotated, row_scale, x, scale, block)


@pytest.mark.parametrize(("inputs", "padded", "block"), [(43, 48, 48), (60, 64, 16), (200, 208, 208), (500, 512, 512)])
def test_rotate_in_writes_the_order_that_the_product_reads(inputs, padded, block, device):
    """Whole pairs of tiles and a last tile alone, with and without Q_M."""
    x, scale = randn(3, inputs).to(device), randn(inputs, seed=1).half().to(device)
    plain, row_scale = gpu.rotate_in(x, scale, padded, block)
    rotated, same_scale = gpu.rotate_in(x, scale, padded, block, fragments=True)
    expected, read = fragments(plain), fragments(torch.ones_like(plain)).bool()
    assert rotated.shape == expected.shape
    assert torch.equal(rotated[read], expected[read])
    assert torch.equal(row_scale, same_scale)


@pytest.mark.parametrize("block", [944, 14336] + ON_GPU * [11008, 28672, 29568])
def test_rotate_in_of_long_rows(block, device):
    """One row over several programs, which agree on the scale."""
    x, scale = randn(2, block).half(), randn(block, seed=1).half()
    check_rotated(*gpu.rotate_in(x.to(device), scale.to(device), block, block), x, scale, block)


@pytest.mark.parametrize("block", [64, 208])
def test_the_scale_of_a_row_does_not_depend_on_the_others(block, device):
    x, scale = randn(17, block).to(device), randn(block, seed=1).half().to(device)
    assert torch.equal(gpu.rotate_in(x, scale, block, block)[1][:2], gpu.rotate_in(x[:2], scale, block, block)[1])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of what the interpreter computes
@pytest.mark.parametrize(("block", "rows"), [(64, 8), (128, 8), (208, 8), (208, 20), (1792, 6)])
def test_rows_of_any_magnitude(block, rows, device):
    """3e38 is near bfloat16's largest number: its transform overflows float32, but not fp16 times the row's scale."""
    magnitudes = torch.ones(rows)
    magnitudes[:3] = torch.tensor([1e30, 1e-30, 0.0])
    x = (randn(rows, block).clamp(-1, 1) * magnitudes[:, None]).bfloat16()
    x[3] = x[3].sign() * 3e38
    scale = torch.ones(block).half()
    rotated, row_scale = (y.cpu().double() for y in gpu.rotate_in(x.to(device), scale.to(device), block, block))
    assert torch.isfinite(rotated).all()
    assert torch.equal(rotated[2], torch.zeros(block).double())
    assert row_scale[2] == 1
    expected = exact(x, block)
    error = (rotated * row_scale[:, None] - expected).norm(dim=1)
    assert (error <= HALF_UNIT * expected.norm(dim=1)).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
@pytest.mark.parametrize(("block", "rows"), [(64, 4), (208, 4), (208, 20)])
def test_a_row_that_is_not_finite_shows_and_spares_the_others(block, rows, bad, device):
    x, scale = randn(rows, block), randn(block, seed=1).half().to(device)
    sound = gpu.rotate_in(x.to(device), scale, block, block)
    x[2, 7] = bad
    rotated, row_scale = gpu.rotate_in(x.to(device), scale, block, block)
    assert not torch.isfinite(rotated[2]).any()
    assert row_scale[2] == 1
    others = [row for row in range(rows) if row != 2]
    assert torch.equal(rotated[others], sound[0][others])
    assert torch.equal(row_scale[others], sound[1][others])


def narrowed(y, dtype):
    """y in `dtype`; Triton's interpreter cuts a bfloat16 off where GPUs round."""
    if INTERPRETED and dtype == torch.bfloat16:
        y = (y.float().view(torch.int32) & -65536).view(torch.float32)
    return y.to(dtype)


def outward(partial, row_scale, scale, bias, block, dtype, outputs, kind):
    """rotate_out's formula in torch, computed in `kind`."""
    total = partial.to(kind).sum(0)
    y = exact(total, block, True) if kind == torch.float64 else by_factors(total, block, True)
    y = y * (1 if row_scale is None else row_scale.to(kind)[:, None])
    y = y[:, :outputs] * scale.to(kind)
    return narrowed(y if bias is None else y + bias.to(kind), dtype)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize(
    ("dtype", "bias_dtype"),
    [
        (torch.float16, None),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.float16, torch.float32),
    ],
)
@pytest.mark.parametrize(("outputs", "count", "block", "rows"), [(250, 256, 256, 3), (205, 208, 208, 2), (90, 96, 48, 17)])
def test_rotate_out_is_its_formula(outputs, count, block, rows, dtype, bias_dtype, parts, device):
    partial, scale = randn(parts, rows, count), randn(outputs, seed=1).half()
    bias = None if bias_dtype is None else randn(outputs, seed=2).to(bias_dtype)
    row_scale = None if parts == 1 else 2.0 ** (torch.arange(rows) % 5 - 2)
    moved = [None if tensor is None else tensor.to(device) for tensor in (partial, row_scale, scale, bias)]
    y = gpu.rotate_out(*moved, block, dtype)
    assert y.shape == (rows, outputs)
    assert y.dtype == dtype
    expected = outward(partial, row_scale, scale, bias, block, torch.float64, outputs, torch.float64)
    assert_as_accurate(y, outward(partial, row_scale, scale, bias, block, dtype, outputs, torch.float32), expected)


def layer(first, count, block, outputs, seed, device, bias=True):
    return (
        first,
        count,
        block,
        randn(outputs, seed=seed).half().to(device),
        randn(outputs, seed=seed + 50).half().to(device) if bias else None,
    )


@pytest.mark.parametrize("rows", [2] + ON_GPU * [1, 17, 40])
def test_layers_fused_into_one_product(rows, device):
    """q, k, v; alike and not, more alike than a launch takes, first columns that are not multiples of 16."""
    partial, row_scale = randn(2, rows, 8 + 96 + 5 * 64).to(device), 2.0 ** (torch.arange(rows) % 5 - 2).to(device)
    layers = [layer(8, 96, 48, 90, 0, device)]
    layers += [layer(104 + 64 * n, 64, 64, 64, n + 1, device, bias=n != 2) for n in range(5)]
    layers.append(layer(8, 96, 48, 90, 9, device))
    rows = partial.shape[1]
    together = gpu.rotate_out_group(partial, row_scale, layers, torch.float32)
    found = [y.view(rows, -1) for y in together.split([rows * len(each[3]) for each in layers])]
    for y, (first, count, block, scale, bias) in zip(found, layers, strict=True):
        assert torch.equal(y, gpu.rotate_out(partial, row_scale, scale, bias, block, torch.float32, (first, count)))
        cpu_bias = None if bias is None else bias.cpu()
        alone = partial.cpu()[:, :, first : first + count]
        expected = outward(alone, row_scale.cpu(), scale.cpu(), cpu_bias, block, torch.float64, len(scale), torch.float64)
        plain = outward(alone, row_scale.cpu(), scale.cpu(), cpu_bias, block, torch.float32, len(scale), torch.float32)
        assert_as_accurate(y, plain, expected)


@pytest.mark.parametrize("block", [64, 208])
def test_a_block_that_is_not_finite_spares_the_next(block, device):
    x = randn(2, 3 * block)
    x[:, block + 3] = float("nan")
    found = gpu.hadamard(x.to(device), block).reshape(2, 3, block)
    assert torch.isfinite(found[:, [0, 2]]).all()
    assert found[:, 1].isnan().all()


@pytest.mark.parametrize("rows", [3, 18])
@pytest.mark.parametrize("block", [64, 208])
def test_what_lies_around_the_operands_is_not_read(block, rows, device):
    """NaN in the rows and columns next to them, where a program's last row, chunk of Q_M or tile ends."""
    around = torch.full((2, rows + 2, 2 * block), float("nan"))
    around[:, 1:-1, 8 : 8 + block] = randn(2, rows, block)
    inner = around.to(device)[:, 1:-1]
    scale = torch.full((block + 64,), float("nan")).half().to(device)
    scale[: block - 4] = 1
    rotated, row_scale = gpu.rotate_in(inner[0, :, 8 : 4 + block], scale[: block - 4], block, block)
    assert torch.isfinite(rotated).all()
    assert torch.isfinite(row_scale).all()
    y = gpu.rotate_out(inner, row_scale, scale[: block - 4], scale[: block - 4], block, torch.float32, (8, block))
    assert torch.isfinite(y).all()


def test_the_same_input_gives_the_same_bits(device):
    x, scale = randn(3, 208).to(device), randn(208, seed=1).half().to(device)
    partial = randn(4, 3, 208).to(device)
    first, again = (gpu.rotate_in(x, scale, 208, 208) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    first, again = (gpu.rotate_out(partial, first[1], scale, None, 208, torch.float32) for _ in range(2))
    assert torch.equal(first, again)


def test_partial_products_are_added_in_order(device):
    """A sum whose value depends on the order: (1 + 2^-24) + 2^-24 is 1 in float32, 1 + (2^-24 + 2^-24) is not."""
    partial = torch.tensor([1.0, 2.0**-24, 2.0**-24]).reshape(3, 1, 1).to(device)
    y = gpu.rotate_out(partial, None, torch.ones(1).half().to(device), None, 1, torch.float32)
    assert float(y) == 1.0


def test_what_was_given_is_left_as_it_was(device):
    x, scale = randn(2, 48).to(device), randn(48, seed=1).half().to(device)
    before = x.clone()
    gpu.rotate_in(x, scale, 48, 48)
    gpu.hadamard(x, 48)
    gpu.rotate_out(x[None], None, scale, None, 48, torch.float16)
    assert torch.equal(x, before)


def test_nothing_gives_nothing(device):
    scale = torch.ones(32).half().to(device)
    assert gpu.hadamard(torch.empty(0, 32, device=device), 32).shape == (0, 32)
    assert gpu.hadamard(torch.empty(2, 0, device=device), 32).shape == (2, 0)
    rotated, row_scale = gpu.rotate_in(torch.empty(0, 32, device=device), scale, 64, 64)
    assert (rotated.shape, row_scale.shape) == ((0, 64), (0,))
    assert gpu.rotate_out(torch.empty(2, 0, 64, device=device), None, scale, None, 64, torch.half).shape == (0, 32)


def test_what_does_not_fit_is_refused(device):
    x, scale = torch.zeros(2, 64, device=device), torch.ones(64, device=device).half()
    partial, rows = x[None], torch.ones(2, device=device)
    with pytest.raises(SpecError, match="blocks of 48"):
        gpu.hadamard(x, 48)
    with pytest.raises(SpecError, match="float64"):
        gpu.hadamard(x.double(), 64)
    with pytest.raises(SpecError, match="padded to 48"):
        gpu.rotate_in(x, scale, 48, 48)
    with pytest.raises(SpecError, match="scale_in"):
        gpu.rotate_in(x, scale[:60], 64, 64)
    with pytest.raises(SpecError, match="int64"):
        gpu.rotate_in(x.long(), scale, 64, 64)
    with pytest.raises(SpecError, match=r"columns 16\.\.80 of 64"):
        gpu.rotate_out(partial, rows, scale, None, 64, torch.half, (16, 64))
    with pytest.raises(SpecError, match="64 outputs in blocks of 16"):
        gpu.rotate_out(partial, rows, scale, None, 16, torch.half, (0, 48))
    with pytest.raises(SpecError, match="bias"):
        gpu.rotate_out(partial, rows, scale, scale[:60], 64, torch.half)
    with pytest.raises(SpecError, match="float16"):
        gpu.rotate_out(partial.half(), rows, scale, None, 64, torch.half)
    with pytest.raises(SpecError, match="row_scale"):
        gpu.rotate_out(partial, rows[:1], scale, None, 64, torch.half)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes CPU tensors")
def test_a_cpu_tensor_is_refused():
    with pytest.raises(DeviceError, match="cpu"):
        gpu.hadamard(torch.zeros(2, 64), 64)


def test_as_compiled_for_nvidia():
    """The machine's own layouts, exchanges and matrix instructions, in the PTX emulator: one row of 28 * 8 * 64 values."""
    block, outputs = 14336, 14320
    cases = {case.name: case for case in gpu.compile_cases()}
    kernels = {name: kernel for (name, _), kernel in compiled.kernels(gpu.__name__, ("sm_80",), "1 of 14336, few").items()}
    x, scale = randn(1, block).half(), randn(block, seed=1).half()
    rotated, row_scale = torch.full((1, block), float("nan")).half(), torch.full((1,), float("nan"))
    partial = randn(3, 1, 2 * block)
    scales, biases = randn(2, outputs, seed=2).half(), randn(2, outputs, seed=3).half()
    y = torch.full((2, 1, outputs), float("nan")).half()
    sizes = {"width_in": block, "x_1": block, "x_2": 0, "y_row": outputs, "y_layer": outputs, "rows": 1}

    def launch(name, **given):
        cut, transpose = gpu.plan(block, 1, True), "out" in name
        dense = gpu._dense(block, transpose, cut.tile, cut.chunk, "cpu")
        values = sizes | given | {"dense_ptr": dense, "dense_row": dense.shape[1]}
        programs = -(-cut.order // cut.tile) * cut.fold * (2 if transpose else 1)
        kernels[name].launch((programs,), *(values[argument] for argument in cases[name].signature))

    launch(
        "hadamard in, 1 of 14336, few rows",
        x_ptr=x, scale_in_ptr=scale, row_scale_ptr=row_scale, y_ptr=rotated, x_row=block, x_part=0, width_out=block,
    )  # fmt: skip
    order = fragments(torch.arange(block)[None])[0]  # the compiled case writes the product's order
    check_rotated(rotated[:, order.argsort()], row_scale, x, scale, block)
    launch(
        "hadamard out, 1 of 14336, few rows, 2 layers",
        x_ptr=partial, row_scale_ptr=row_scale, scale_out_ptr=scales[0], scale_out_1_ptr=scales[1], scale_out_2_ptr=scales[1],
        bias_ptr=biases[0], bias_1_ptr=biases[1], bias_2_ptr=biases[1], y_ptr=y, parts=3, x_row=2 * block, x_part=2 * block,
        width_out=outputs,
    )  # fmt: skip
    for layer, half in enumerate(partial.split(block, 2)):
        given = half, row_scale, scales[layer], biases[layer], block
        expected = outward(*given, torch.float64, outputs, torch.float64)
        assert_as_accurate(y[layer], outward(*given, torch.float16, outputs, torch.float32), expected)
