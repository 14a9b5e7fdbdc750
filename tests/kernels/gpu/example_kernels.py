"""Owns small Triton kernels for the tests of the PTX emulator and of the compiler's table."""

import triton
import triton.language as tl

from qtipcli_kernels.compiling import CompileCase

GLUON = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 6)
"""Whether this Triton has a Gluon that names its layouts as example_gluon.py does."""


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, n, SIZE: tl.constexpr):
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    inside = place < n
    x = tl.load(x_ptr + place, mask=inside)
    y = tl.load(y_ptr + place, mask=inside)
    tl.store(out_ptr + place, x + y, mask=inside)


@triton.jit
def add_unmasked_kernel(x_ptr, y_ptr, out_ptr, n, SIZE: tl.constexpr):
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out_ptr + place, tl.load(x_ptr + place) + tl.load(y_ptr + place))


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, tiles, ROWS: tl.constexpr, INNER: tl.constexpr, COLUMNS: tl.constexpr, SUM: tl.constexpr):
    """out [ROWS, COLUMNS] of type SUM = sum over tiles of a [t, ROWS, INNER] @ b [t, INNER, COLUMNS]."""
    row, inner, column = tl.arange(0, ROWS), tl.arange(0, INNER), tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), SUM)
    for tile in range(tiles):
        a = tl.load(a_ptr + tile * ROWS * INNER + row[:, None] * INNER + inner)
        b = tl.load(b_ptr + tile * INNER * COLUMNS + inner[:, None] * COLUMNS + column)
        total = tl.dot(a, b, total, out_dtype=SUM)
    tl.store(out_ptr + row[:, None] * COLUMNS + column, total)


@triton.jit
def softmax_kernel(x_ptr, out_ptr, n, SIZE: tl.constexpr):
    """A row's softmax: reductions across lanes and, through shared memory, across warps."""
    place = tl.arange(0, SIZE)
    row = tl.program_id(0) * n
    x = tl.load(x_ptr + row + place, mask=place < n, other=float("-inf")).to(tl.float32)
    e = tl.exp(x - tl.max(x, axis=0))
    tl.store(out_ptr + row + place, e / tl.sum(e, axis=0), mask=place < n)


@triton.jit
def scan_kernel(x_ptr, out_ptr, turns, SIZE: tl.constexpr):
    """int32: a cumulative sum of a transposed square, in a loop whose length depends on the program."""
    place = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)
    x = tl.load(x_ptr + place)
    for turn in range(turns + tl.program_id(0)):
        x = tl.cumsum(tl.trans(x), axis=0) ^ turn
    tl.store(out_ptr + tl.program_id(0) * SIZE * SIZE + place, x)


def compile_cases():
    arrays = ("x_ptr", "y_ptr", "out_ptr")
    add = dict.fromkeys(arrays, "*fp32") | {"n": "i32"}
    yield CompileCase("add", add_kernel, add, {"SIZE": 128}, 4, divisible=arrays)
    brain = dict.fromkeys(arrays, "*bf16") | {"n": "i32"}
    yield CompileCase("add bf16", add_kernel, brain, {"SIZE": 512}, 2, divisible=arrays)
    yield CompileCase("add unmasked", add_unmasked_kernel, add, {"SIZE": 128}, 4, divisible=arrays)
    for name, size, inner, warps, stages, element, total in (
        ("dot 16 fp16", 16, 16, 1, 1, "fp16", tl.float32),
        ("dot 32 fp16", 32, 32, 2, 3, "fp16", tl.float32),
        ("dot 32 bf16", 32, 16, 4, 2, "bf16", tl.float32),
        ("dot 16 i8", 16, 32, 1, 2, "i8", tl.int32),
    ):
        pointers = {"a_ptr": f"*{element}", "b_ptr": f"*{element}", "out_ptr": "*i32" if total is tl.int32 else "*fp32"}
        shape = {"ROWS": size, "INNER": inner, "COLUMNS": size, "SUM": total}
        yield CompileCase(name, dot_kernel, {**pointers, "tiles": "i32"}, shape, warps, stages, divisible=tuple(pointers))
    yield CompileCase("softmax", softmax_kernel, {"x_ptr": "*fp16", "out_ptr": "*fp32", "n": "i32"}, {"SIZE": 256}, 4)
    yield CompileCase("scan", scan_kernel, {"x_ptr": "*i32", "out_ptr": "*i32", "turns": "i32"}, {"SIZE": 16}, 4)
    if GLUON:
        import example_gluon

        yield from example_gluon.compile_cases()
