"""Owns the choice of implementation for each operator: Numba on CPUs, the reference elsewhere, as torch.library custom ops.

The functions below are the package's public face. Each op has a fake implementation, so torch.compile traces through it.
Dimension key: B rows of x, O outputs, I inputs, W words a tile.
"""

import torch

from qtipcli_kernels.codes import tabulate
from qtipcli_kernels.decode import cpu as decode_cpu
from qtipcli_kernels.decode import reference as decode_reference
from qtipcli_kernels.hadamard import cpu as hadamard_cpu
from qtipcli_kernels.hadamard import reference as hadamard_reference
from qtipcli_kernels.matvec import cpu as matvec_cpu
from qtipcli_kernels.spec import TILE, TILE_WEIGHTS, SpecError, TrellisSpec
from qtipcli_kernels.viterbi import cpu as viterbi_cpu
from qtipcli_kernels.viterbi import reference as viterbi_reference

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
    """The matrix that a packed one holds: int32 [O/16, I/16 * W] -> float32 [O, I]."""
    _check_packed(trellis, spec)
    return torch.ops.qtip.decode(trellis, lut, *_fields(spec))


def matvec(x: torch.Tensor, trellis: torch.Tensor, spec: TrellisSpec, lut: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T: floating [..., I] -> [..., O] in x's dtype, computed in float32. Differentiable in x only."""
    _check_packed(trellis, spec)
    inputs = trellis.shape[1] // spec.words_per_tile * TILE
    if x.ndim == 0 or x.shape[-1] != inputs or not x.is_floating_point():
        raise SpecError(f"x is {x.dtype} {tuple(x.shape)}: this packed matrix multiplies floating tensors [..., {inputs}]")
    if lut is not None and lut.requires_grad:
        raise SpecError("the table requires a gradient, which the packed product does not give: decode the matrix to train it")
    rows = x.reshape(-1, inputs).to(torch.float32)
    product = torch.ops.qtip.matvec(rows, trellis, lut, *_fields(spec))
    return product.reshape(*x.shape[:-1], trellis.shape[0] * TILE).to(x.dtype)


def hadamard(x: torch.Tensor, block: int, transpose: bool = False) -> torch.Tensor:
    """The orthonormal transform of the last dimension in blocks, float32 or float64 [..., n]. Differentiable in x."""
    if x.dtype not in (torch.float32, torch.float64):
        raise SpecError(f"x is {x.dtype}: the transform is computed in float32 or float64")
    return torch.ops.qtip.hadamard(x, block, transpose)


def implementation(device: torch.device | str) -> str:
    """Which implementation serves a device, for reports: "numba" on CPUs, "reference" elsewhere."""
    return "numba" if torch.device(device).type == "cpu" else "reference"


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
    chosen = viterbi_cpu if tiles.is_cpu else viterbi_reference
    return chosen.encode(tiles, spec, table, fast)


@_encode.register_fake
def _(tiles, table, code, bits_per_step, state_bits, weights_per_step, fast):
    return tiles.new_empty((tiles.shape[0], TILE_WEIGHTS // weights_per_step), dtype=torch.int32)


@_define("decode", f"Tensor trellis, Tensor? lut, {SPEC_SCHEMA}")
def _decode(trellis, lut, *fields):
    return (decode_cpu if trellis.is_cpu else decode_reference).decode(trellis.contiguous(), TrellisSpec(*fields), lut)


@_decode.register_fake
def _(trellis, lut, *fields):
    rows, words = trellis.shape
    return trellis.new_empty((rows * TILE, words // TrellisSpec(*fields).words_per_tile * TILE), dtype=torch.float32)


@_define("matvec", f"Tensor x, Tensor trellis, Tensor? lut, {SPEC_SCHEMA}")
def _matvec(x, trellis, lut, *fields):
    spec, trellis = TrellisSpec(*fields), trellis.contiguous()
    if x.is_cpu and len(x) <= FUSED_ROWS:
        return matvec_cpu.matvec(x.detach().contiguous(), trellis, spec, lut)
    product_BO = x.new_empty(len(x), len(trellis) * TILE)
    for outputs, weight_OI in _strips(trellis, spec, lut):
        product_BO[:, outputs] = x @ weight_OI.T
    return product_BO


@_matvec.register_fake
def _(x, trellis, lut, *fields):
    return x.new_empty((x.shape[0], trellis.shape[0] * TILE))


@_define("matvec_grad", f"Tensor grad, Tensor trellis, Tensor? lut, {SPEC_SCHEMA}")
def _matvec_grad(grad, trellis, lut, *fields):
    """The gradient of `matvec` with respect to x: grad W, float32 [B, O] -> [B, I]."""
    spec = TrellisSpec(*fields)
    grad_x_BI = grad.new_zeros(len(grad), trellis.shape[1] // spec.words_per_tile * TILE)
    for outputs, weight_OI in _strips(trellis.contiguous(), spec, lut):
        grad_x_BI.addmm_(grad[:, outputs], weight_OI)
    return grad_x_BI


@_matvec_grad.register_fake
def _(grad, trellis, lut, *fields):
    return grad.new_empty((grad.shape[0], trellis.shape[1] // TrellisSpec(*fields).words_per_tile * TILE))


def _strips(trellis: torch.Tensor, spec: TrellisSpec, lut: torch.Tensor | None):
    inputs = trellis.shape[1] // spec.words_per_tile * TILE
    tile_rows = max(1, STRIP_WEIGHTS // (inputs * TILE))
    return (decode_cpu if trellis.is_cpu else decode_reference).strips(trellis, spec, lut, tile_rows)


def _save_packed(ctx, inputs, output):
    _, trellis, lut, *ctx.fields = inputs
    ctx.save_for_backward(trellis, lut)


def _matvec_backward(ctx, grad):
    return torch.ops.qtip.matvec_grad(grad, *ctx.saved_tensors, *ctx.fields), None, None, None, None, None, None


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
