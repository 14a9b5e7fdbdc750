"""Owns the choice of implementation for each operator: device and spec -> Numba or reference, as torch.library custom ops.

The functions below are the package's public face. Each op has a fake implementation, so torch.compile traces through it.
"""

import torch

from qtipcli_kernels.codes import tabulate
from qtipcli_kernels.decode import cpu as decode_cpu
from qtipcli_kernels.decode import reference as decode_reference
from qtipcli_kernels.hadamard import cpu as hadamard_cpu
from qtipcli_kernels.hadamard import reference as hadamard_reference
from qtipcli_kernels.matvec import reference as matvec_reference
from qtipcli_kernels.spec import TILE, TILE_WEIGHTS, SpecError, TrellisSpec
from qtipcli_kernels.viterbi import cpu as viterbi_cpu
from qtipcli_kernels.viterbi import reference as viterbi_reference

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
    """The matrix that a packed one holds: int32 [O/16, I/16 * W] -> float32 [O, I]."""
    return torch.ops.qtip.decode(trellis, lut, *_fields(spec))


def matvec(x: torch.Tensor, trellis: torch.Tensor, spec: TrellisSpec, lut: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T: floating [..., I] -> [..., O] in x's dtype, computed in float32. Differentiable in x."""
    columns = trellis.shape[-1] // spec.words_per_tile * TILE
    if x.shape[-1] != columns:
        raise SpecError(f"x has {x.shape[-1]} features, the packed matrix {columns} inputs")
    rows = x.reshape(-1, columns).to(torch.float32)
    return torch.ops.qtip.matvec(rows, trellis, lut, *_fields(spec)).reshape(*x.shape[:-1], trellis.shape[0] * TILE).to(x.dtype)


def hadamard(x: torch.Tensor, block: int, transpose: bool = False) -> torch.Tensor:
    """The orthonormal transform of the last dimension in blocks, float32 or float64 [..., n]. Differentiable in x."""
    return torch.ops.qtip.hadamard(x, block, transpose)


def implementation(device: torch.device | str) -> str:
    """Which implementation serves a device, for reports: "numba" on CPUs, "reference" elsewhere."""
    return "numba" if torch.device(device).type == "cpu" else "reference"


def _fields(spec: TrellisSpec) -> tuple[str, int, int, int]:
    return spec.code, spec.bits_per_step, spec.state_bits, spec.weights_per_step


def _define(name: str, arguments: str):
    return torch.library.custom_op(f"qtip::{name}", mutates_args=(), schema=f"({arguments}) -> Tensor")


@_define("encode", f"Tensor tiles, Tensor table, {SPEC_SCHEMA}, bool fast")
def _encode(tiles, table, code, bits_per_step, state_bits, weights_per_step, fast):
    spec = TrellisSpec(code, bits_per_step, state_bits, weights_per_step)
    chosen = viterbi_cpu if tiles.is_cpu else viterbi_reference
    return chosen.encode(tiles, spec, table, fast)


@_encode.register_fake
def _(tiles, table, code, bits_per_step, state_bits, weights_per_step, fast):
    return tiles.new_empty((tiles.shape[0], TILE_WEIGHTS // weights_per_step), dtype=torch.int32)


@_define("decode", f"Tensor trellis, Tensor? lut, {SPEC_SCHEMA}")
def _decode(trellis, lut, code, bits_per_step, state_bits, weights_per_step):
    spec = TrellisSpec(code, bits_per_step, state_bits, weights_per_step)
    return (decode_cpu if trellis.is_cpu else decode_reference).decode(trellis, spec, lut)


@_decode.register_fake
def _(trellis, lut, code, bits_per_step, state_bits, weights_per_step):
    spec = TrellisSpec(code, bits_per_step, state_bits, weights_per_step)
    rows, words = trellis.shape
    return trellis.new_empty((rows * TILE, words // spec.words_per_tile * TILE), dtype=torch.float32)


@_define("matvec", f"Tensor x, Tensor trellis, Tensor? lut, {SPEC_SCHEMA}")
def _matvec(x, trellis, lut, code, bits_per_step, state_bits, weights_per_step):
    spec = TrellisSpec(code, bits_per_step, state_bits, weights_per_step)
    if not x.is_cpu:
        return matvec_reference.matvec(x, trellis, spec, lut)
    return x @ decode_cpu.decode(trellis, spec, lut).T


@_matvec.register_fake
def _(x, trellis, lut, code, bits_per_step, state_bits, weights_per_step):
    return x.new_empty((x.shape[0], trellis.shape[0] * TILE))


def _save_packed(ctx, inputs, output):
    _, trellis, lut, *ctx.fields = inputs
    ctx.save_for_backward(trellis, lut)


def _matvec_backward(ctx, grad):
    trellis, lut = ctx.saved_tensors
    weight_OI = torch.ops.qtip.decode(trellis, lut, *ctx.fields)
    return grad @ weight_OI, None, None, None, None, None, None


_matvec.register_autograd(_matvec_backward, setup_context=_save_packed)


@_define("hadamard", "Tensor x, int block, bool transpose")
def _hadamard(x, block, transpose):
    chosen = hadamard_cpu if x.is_cpu else hadamard_reference
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
