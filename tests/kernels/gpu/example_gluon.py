"""Owns a small Gluon kernel for the tests of the PTX emulator: layouts by hand, a conversion between them, mma."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from qtipcli_kernels.compiling import CompileCase


@gluon.jit
def gluon_dot_kernel(a_ptr, b_ptr, out_ptr, LOADED: gl.constexpr, PRODUCT: gl.constexpr):
    """out [16, 16] float32 = a [16, 16] @ b [16, 16], fp16."""
    row = gl.arange(0, 16, gl.SliceLayout(1, LOADED))[:, None]
    column = gl.arange(0, 16, gl.SliceLayout(0, LOADED))[None, :]
    a = gl.convert_layout(gl.load(a_ptr + row * 16 + column), gl.DotOperandLayout(0, PRODUCT, 2))
    b = gl.convert_layout(gl.load(b_ptr + row * 16 + column), gl.DotOperandLayout(1, PRODUCT, 2))
    total = mma_v2(a, b, gl.zeros([16, 16], gl.float32, PRODUCT))
    gl.store(out_ptr + row * 16 + column, gl.convert_layout(total, LOADED))


def compile_cases():
    loaded = gl.BlockedLayout([1, 4], [8, 4], [1, 1], [1, 0])
    product = gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])
    pointers = {"a_ptr": "*fp16", "b_ptr": "*fp16", "out_ptr": "*fp32"}
    layouts = {"LOADED": loaded, "PRODUCT": product}
    options = {"divisible": tuple(pointers), "gluon": True, "nvidia_only": True}
    yield CompileCase("gluon dot", gluon_dot_kernel, pointers, layouts, 1, **options)
