"""Owns the choice of implementation for each operator: Numba on CPUs, Triton on GPUs, else the reference; as custom ops.

The functions below are the package's public face. Each op has a fake implementation, so torch.compile traces through it.
Dimension key: B rows of x, O outputs, I inputs, W words a tile.
"""

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from importlib import import_module
from types import ModuleType

import torch

from qtipcli_kernels import device as devices
from qtipcli_kernels.codes import default_lut, lut_shape, tabulate
from qtipcli_kernels.spec import TILE, TILE_WEIGHTS, SpecError, TrellisSpec

FUSED_ROWS = 1024
"""Most rows of x that go to the CPU kernel which decodes into registers; more go to a library product with decoded strips.

2 bits, 4096 x 4096, 1mad, float32, on two cores of an EPYC 9004 (AVX-512), milliseconds, fused / strips: 64 rows 20 / 41,
256 rows 126 / 198, 1,024 rows 526 / 584.
"""

STRIP_WEIGHTS = 1 << 22
"""Weights decoded at a time, 16 MiB, where a product is taken with decoded strips: its memory bound, whatever the matrix."""

SPEC_SCHEMA = "str code, int bits_per_step, int state_bits, int weights_per_step"


def encode(tiles: torch.Tensor, spec: TrellisSpec, table: torch.Tensor | None = None, fast: bool = False) -> torch.Tensor:
    """The walk nearest to each tile: float32 [N, 256] in walk order -> states int32 [N, T].

    table: the tabulated code (`codes.tabulate`), float32 [2^L, V]; the default one where None.
    """
    if tiles.ndim != 2 or tiles.shape[1] != TILE_WEIGHTS:
        raise SpecError(f"tiles have shape {tuple(tiles.shape)}: they must be [N, {TILE_WEIGHTS}]")
    table = tabulate(spec) if table is None else table
    return torch.ops.qtip.encode(tiles, table.to(tiles.device), *_fields(spec), fast)


def decode(trellis: torch.Tensor, spec: TrellisSpec, lut: torch.Tensor | None = None) -> torch.Tensor:
    """The matrix that a packed one holds: int32 [O/16, I/16 * W] -> float32 [O, I]. Differentiable in lut."""
    _check_packed(trellis, spec)
    return torch.ops.qtip.decode(trellis, lut, *_fields(spec))


def matvec(x: torch.Tensor, trellis: torch.Tensor, spec: TrellisSpec, lut: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T: floating [..., I] -> [..., O] in x's dtype, summed in float32. Differentiable in x and lut.

    Computed in float32, but for fp16 rows on a GPU: there the weights are rounded to fp16 where they are not already.

    lut: fp16, or a float32 master copy of it. Its gradient is summed in float64 and has its dtype: sums over all weights that
    read an entry can overflow fp16, so train the copy.
    """
    _check_packed(trellis, spec)
    inputs = trellis.shape[1] // spec.words_per_tile * TILE
    if x.ndim == 0 or x.shape[-1] != inputs or not x.is_floating_point():
        raise SpecError(f"x is {x.dtype} {tuple(x.shape)}: this packed matrix multiplies floating tensors [..., {inputs}]")
    rows = x.reshape(-1, inputs)
    if x.dtype != torch.float16 or implementation(x.device) != TRITON:
        rows = rows.to(torch.float32)
    product = torch.ops.qtip.matvec(rows, trellis, _stored(spec, lut, x), *_fields(spec))
    return product.reshape(*x.shape[:-1], trellis.shape[0] * TILE).to(x.dtype)


def hadamard(x: torch.Tensor, block: int, transpose: bool = False) -> torch.Tensor:
    """The orthonormal transform of the last dimension in blocks, float32 or float64 [..., n]. Differentiable in x."""
    if x.dtype not in (torch.float32, torch.float64):
        raise SpecError(f"x is {x.dtype}: the transform is computed in float32 or float64")
    return torch.ops.qtip.hadamard(x, block, transpose)


def packed_linear(
    x: torch.Tensor,
    scale_in: torch.Tensor,
    block_in: int,
    trellis: torch.Tensor,
    spec: TrellisSpec,
    lut: torch.Tensor | None,
    outputs: Sequence[tuple[int, int, torch.Tensor, torch.Tensor | None]],
) -> list[torch.Tensor]:
    """Whole layers that share an input, on a device that `implementation` calls "triton"; not differentiable.

    x: fp16, bf16 or float32 [..., I]. outputs: for each layer padded outputs, block, scale and bias (layer.OutputSide).
    Returns [..., O] for each, in x's dtype.
    """
    _check_packed(trellis, spec)
    padded, blocks, scales, biases = (list(each) for each in zip(*outputs, strict=True))
    rows = x.reshape(-1, x.shape[-1])
    together = torch.ops.qtip.packed_linear(
        rows, scale_in, block_in, trellis, _stored(spec, lut, x), padded, blocks, scales, biases, *_fields(spec)
    )
    ys = together.split([rows.shape[0] * scale.shape[0] for scale in scales])
    return [y.view(*x.shape[:-1], scale.shape[0]) for y, scale in zip(ys, scales, strict=True)]


NUMBA, TRITON, REFERENCE = "numba", "triton", "reference"


def implementation(device: torch.device | str) -> str:
    """What serves a device, for reports: "numba" on CPUs, "triton" on GPUs that it runs on, else the slow "reference"."""
    kind = torch.device(device).type
    if kind == "cpu":
        return NUMBA
    return TRITON if devices.why_not(device) is None else REFERENCE


_MODULES = {NUMBA: "cpu", TRITON: "gpu", REFERENCE: "reference"}


def _twin(operator: str, tensor: torch.Tensor) -> ModuleType:
    """The module that serves `operator` where `tensor` lies."""
    chosen = implementation(tensor.device)
    if chosen == REFERENCE:
        _say_that_it_is_slow(tensor.device)
    return _module(f"{operator}.{_MODULES[chosen]}")


@cache
def _say_that_it_is_slow(device: torch.device) -> None:
    reason = devices.why_not(device)
    warnings.warn(f"{device} is served by the torch reference, which is right but slow: {reason}", RuntimeWarning, stacklevel=2)


def _beside(tensor: torch.Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's where there are several."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@cache
def _module(name: str) -> ModuleType:
    # Not at import: Triton is absent where there is no GPU, Numba may be where there is one, and both are slow to load.
    return import_module(f"qtipcli_kernels.{name}")


def _stored(spec: TrellisSpec, lut: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
    """The table to read: the default one is kept on each device, where copying it for every product would take longer."""
    return _default_lut(spec, like.device) if lut is None and not like.is_cpu and lut_shape(spec) else lut


@lru_cache(maxsize=16)
def _default_lut(spec: TrellisSpec, device: torch.device) -> torch.Tensor:
    return default_lut(spec).to(device)


def _check_packed(trellis: torch.Tensor, spec: TrellisSpec) -> None:
    words = spec.words_per_tile
    if trellis.dtype != torch.int32 or trellis.ndim != 2 or trellis.shape[1] % words:
        raise SpecError(f"a packed matrix is int32 [O/16, I/16 * {words}], not {trellis.dtype} {tuple(trellis.shape)}")


def _fields(spec: TrellisSpec) -> tuple[str, int, int, int]:
    return spec.code, spec.bits_per_step, spec.state_bits, spec.weights_per_step


def _define(name: str, arguments: str):
    return torch.library.custom_op(f"qtip::{name}", mutates_args=(), schema=f"({arguments}) -> Tensor")


@_define("encode", f"Tensor tiles, Tensor table, {SPEC_SCHEMA}, bool fast")
def _encode(tiles, table, code, bits_per_step, state_bits, weights_per_step, fast):
    spec = TrellisSpec(code, bits_per_step, state_bits, weights_per_step)
    with _beside(tiles):
        return _twin("viterbi", tiles).encode(tiles, spec, table, fast)


@_encode.register_fake
def _(tiles, table, code, bits_per_step, state_bits, weights_per_step, fast):
    return tiles.new_empty((tiles.shape[0], TILE_WEIGHTS // weights_per_step), dtype=torch.int32)


@_define("decode", f"Tensor trellis, Tensor? lut, {SPEC_SCHEMA}")
def _decode(trellis, lut, *fields):
    with _beside(trellis):
        return _twin("decode", trellis).decode(trellis.contiguous(), TrellisSpec(*fields), lut)


@_decode.register_fake
def _(trellis, lut, *fields):
    rows, words = trellis.shape
    return trellis.new_empty((rows * TILE, words // TrellisSpec(*fields).words_per_tile * TILE), dtype=torch.float32)


@_define("matvec", f"Tensor x, Tensor trellis, Tensor? lut, {SPEC_SCHEMA}")
def _matvec(x, trellis, lut, *fields):
    spec, trellis = TrellisSpec(*fields), trellis.contiguous()
    if x.is_cpu and len(x) <= FUSED_ROWS:
        return _twin("matvec", x).matvec(x.detach().contiguous(), trellis, spec, lut)
    if not x.is_cpu and implementation(x.device) == TRITON:
        with _beside(x):
            return _module("layer").products(x.detach(), trellis, spec, lut).sum(0)
    product_BO = x.new_empty(len(x), len(trellis) * TILE)
    with _as_given(x), _beside(x):
        for outputs, weight_OI in _strips(trellis, spec, lut):
            product_BO[:, outputs] = x @ weight_OI.T
    return product_BO


@_matvec.register_fake
def _(x, trellis, lut, *fields):
    return x.new_empty((x.shape[0], trellis.shape[0] * TILE), dtype=torch.float32)


@_define("matvec_grad", f"Tensor grad, Tensor trellis, Tensor? lut, {SPEC_SCHEMA}")
def _matvec_grad(grad, trellis, lut, *fields):
    """The gradient of `matvec` with respect to x: grad W, float32 [B, O] -> [B, I]."""
    spec = TrellisSpec(*fields)
    grad_x_BI = grad.new_zeros(len(grad), trellis.shape[1] // spec.words_per_tile * TILE)
    with _as_given(grad), _beside(grad):
        for outputs, weight_OI in _strips(trellis.contiguous(), spec, lut):
            grad_x_BI.addmm_(grad[:, outputs], weight_OI)
    return grad_x_BI


@_matvec_grad.register_fake
def _(grad, trellis, lut, *fields):
    return grad.new_empty((grad.shape[0], trellis.shape[1] // TrellisSpec(*fields).words_per_tile * TILE))


def _as_given(x: torch.Tensor) -> torch.autocast:
    """Products in the dtype of their operands: autocast reaches into custom ops, and would make bfloat16 of float32."""
    return torch.autocast(x.device.type, enabled=False)


def _strips(trellis: torch.Tensor, spec: TrellisSpec, lut: torch.Tensor | None):
    return _twin("decode", trellis).strips(trellis, spec, lut, _strip_tile_rows(trellis, spec))


def _strip_tile_rows(trellis: torch.Tensor, spec: TrellisSpec) -> int:
    return max(1, STRIP_WEIGHTS // (trellis.shape[1] // spec.words_per_tile * TILE * TILE))


@_define("lut_grad", f"Tensor grad, Tensor x, Tensor trellis, {SPEC_SCHEMA}")
def _lut_grad(grad, x, trellis, *fields):
    """The gradient of `matvec` with respect to its table: float32 [B, O] and [B, I] -> float32 of the table's shape."""
    spec = TrellisSpec(*fields)
    strip_rows = min(_strip_tile_rows(trellis, spec), len(trellis)) * TILE
    buffer_OI = x.new_empty(strip_rows, x.shape[1])
    with _as_given(x):
        return _summed_by_entry(
            lambda outputs: torch.mm(grad[:, outputs].T, x, out=buffer_OI[: outputs.stop - outputs.start]), trellis, spec
        )


@_define("decode_grad", f"Tensor grad, Tensor trellis, {SPEC_SCHEMA}")
def _decode_grad(grad, trellis, *fields):
    """The gradient of `decode` with respect to its table: float32 [O, I] -> float32 of the table's shape."""
    return _summed_by_entry(lambda outputs: grad[outputs], trellis, TrellisSpec(*fields))


def _summed_by_entry(gradient_of, trellis: torch.Tensor, spec: TrellisSpec) -> torch.Tensor:
    gradient = _module("decode.gradient")
    chosen = gradient.lut_grad_cpu if trellis.is_cpu else gradient.lut_grad
    return chosen(gradient_of, trellis.contiguous(), spec, _strip_tile_rows(trellis, spec))


@_lut_grad.register_fake
def _(grad, x, trellis, *fields):
    return grad.new_empty(lut_shape(TrellisSpec(*fields)))


@_decode_grad.register_fake
def _(grad, trellis, *fields):
    return grad.new_empty(lut_shape(TrellisSpec(*fields)))


def _save_packed(ctx, inputs, output):
    x, trellis, lut, *ctx.fields = inputs
    ctx.x_dtype = x.dtype
    # x is many times the size of the rest, and only a table that is trained needs it.
    ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, trellis, lut)


def _matvec_backward(ctx, grad):
    x, trellis, lut = ctx.saved_tensors
    needs_x, _, needs_lut, *_ = ctx.needs_input_grad
    grad_x = torch.ops.qtip.matvec_grad(grad, trellis, lut, *ctx.fields).to(ctx.x_dtype) if needs_x else None
    grad_lut = torch.ops.qtip.lut_grad(grad, x.float(), trellis, *ctx.fields).to(lut.dtype) if needs_lut else None
    return grad_x, None, grad_lut, None, None, None, None


_matvec.register_autograd(_matvec_backward, setup_context=_save_packed)


def _save_trellis(ctx, inputs, output):
    trellis, lut, *ctx.fields = inputs
    ctx.lut_dtype = None if lut is None else lut.dtype
    ctx.save_for_backward(trellis)


def _decode_backward(ctx, grad):
    (trellis,) = ctx.saved_tensors
    grad_lut = torch.ops.qtip.decode_grad(grad, trellis, *ctx.fields).to(ctx.lut_dtype) if ctx.needs_input_grad[1] else None
    return None, grad_lut, None, None, None, None


_decode.register_autograd(_decode_backward, setup_context=_save_trellis)


_LAYERS = "int[] padded, int[] blocks, Tensor[] scales, Tensor?[] biases"


@torch.library.custom_op(
    "qtip::packed_linear",
    mutates_args=(),
    schema=f"(Tensor x, Tensor scale_in, int block_in, Tensor trellis, Tensor? lut, {_LAYERS}, {SPEC_SCHEMA}) -> Tensor",
)
def _packed_linear(x, scale_in, block_in, trellis, lut, padded, blocks, scales, biases, *fields):
    layer = _module("layer")
    outputs = [layer.OutputSide(*each) for each in zip(padded, blocks, scales, biases, strict=True)]
    with _beside(x):
        return layer.packed_linear(x, scale_in, block_in, trellis, TrellisSpec(*fields), lut, outputs)


@_packed_linear.register_fake
def _(x, scale_in, block_in, trellis, lut, padded, blocks, scales, biases, *fields):
    return x.new_empty(x.shape[0] * sum(scale.shape[0] for scale in scales))


@_define("hadamard", "Tensor x, int block, bool transpose")
def _hadamard(x, block, transpose):
    chosen = _module("hadamard.factored") if x.dtype == torch.float64 and not x.is_cpu else _twin("hadamard", x)
    with _beside(x):
        out = chosen.hadamard(x, block, transpose)
    # A custom op may not return its input, which a transform of width one would.
    return out.clone() if out.data_ptr() == x.data_ptr() else out


@_hadamard.register_fake
def _(x, block, transpose):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save_turn(ctx, inputs, output):
    _, ctx.block, ctx.transpose = inputs


def _hadamard_backward(ctx, grad):
    return torch.ops.qtip.hadamard(grad, ctx.block, not ctx.transpose), None, None


_hadamard.register_autograd(_hadamard_backward, setup_context=_save_turn)
