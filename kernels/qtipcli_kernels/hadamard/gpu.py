"""Owns the orthonormal transform on GPUs, fused with what a layer does around it: one launch before the product and one after.

A block of Q_M (x) H_{2^p} is cut as Q_M (x) H_F (x) H_P. A program computes one index of H_F: it adds its F inputs with their
signs as it loads them, multiplies by Q_M on the tensor cores, and does H_P by butterflies between registers, a radix of up to
32 for each trip through shared memory. F > 1 spreads one row over several programs, or makes a long block fit into one.

Tensor cores take bfloat16, so a float32 is cut into three parts of eight bits, which is exact; so are Paley's entries, +-1.

Dimension key: B rows, I inputs, O outputs, N padded columns (whole blocks), S partial products.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, log2, sqrt
from typing import TYPE_CHECKING

import torch
import triton

from qtipcli_kernels import device
from qtipcli_kernels.fragments import FRAGMENT_INPUTS
from qtipcli_kernels.hadamard.butterflies import GUARD_BITS, dense_kernel, sylvester_kernel
from qtipcli_kernels.hadamard.factor import factor
from qtipcli_kernels.hadamard.reference import check_block
from qtipcli_kernels.spec import SpecError

if TYPE_CHECKING:
    from qtipcli_kernels.compiling import CompileCase

DECODE_ROWS = 16
"""Up to here latency counts: a row is spread over several programs. Above, a program takes as many rows as it can hold."""

LARGEST_TILE = 8192
"""Values that one program transforms without Q_M: 32 KiB of shared memory, which every target has."""

LAYERS = 3
"""Layers alike whose outputs one launch transforms."""

DECODE_VALUES = 2048
"""Values that a program keeps of one row, after its F inputs are added, while DECODE_ROWS is not exceeded."""


def hadamard(x: torch.Tensor, block: int, transpose: bool = False) -> torch.Tensor:
    """Transform the last dimension in blocks; the contract of `reference.hadamard`, for float32 [..., n] on a GPU.

    Raises DeviceError, and SpecError for another dtype: float64 is `reference.hadamard`'s.
    """
    device.check(x=x)
    check_block(x, block)
    if x.dtype != torch.float32:
        raise SpecError(f"x is {x.dtype}: on a GPU the transform is computed in float32 (float64: reference.hadamard)")
    if x.numel() == 0:
        return torch.empty_like(x)
    rows = x.reshape(-1, x.shape[-1])
    y = torch.empty_like(rows, memory_format=torch.contiguous_format)
    _launch(rows[None], y[None], block, transpose)
    return y.reshape(x.shape)


def rotate_in(
    x_BI: torch.Tensor, scale_in_I: torch.Tensor, padded: int, block: int, fragments: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """H pad(scale_in * x) in fp16 with one power of two a row: (rotated_BN fp16 [B, padded], row_scale_B float32 [B]).

    rotated * row_scale is the transform, computed in float32 and rounded to fp16. row_scale takes N times the row's root mean
    square to [2^14, 2^15): then neither a row nor its fp16 product with weights of unit variance can overflow (Cauchy and
    Schwarz), and fp16 has its 11 bits down to N 2^-28 of that mean. A row of zeros has row_scale 1, and one with a NaN or an
    infinity, which shows in `rotated`. Rows of values below 1e-30 lose precision to float32's denormal numbers.

    x_BI: fp16, bf16 or float32 [B, I]. scale_in_I: fp16 [I]. fragments: rotated comes in that order (fragments.py), [B,
    padded rounded up to 32], what is never read unwritten. Raises DeviceError, SpecError.
    """
    device.check(x=x_BI, scale_in=scale_in_I)
    if x_BI.ndim != 2 or scale_in_I.shape != x_BI.shape[1:] or not x_BI.is_floating_point():
        found = f"x is {x_BI.dtype} {tuple(x_BI.shape)} and scale_in {tuple(scale_in_I.shape)}"
        raise SpecError(f"{found}: they must be floating [B, I] and [I]")
    if block < 1 or padded % block or padded < max(block, x_BI.shape[1]):
        raise SpecError(f"{x_BI.shape[1]} inputs padded to {padded} are not cut into blocks of {block}")
    width = -(-padded // FRAGMENT_INPUTS) * FRAGMENT_INPUTS if fragments else padded
    rotated_BN = x_BI.new_empty((x_BI.shape[0], width), dtype=torch.float16)
    row_scale_B = x_BI.new_empty(x_BI.shape[0], dtype=torch.float32)
    y_BN = rotated_BN[:, :padded]
    _launch(x_BI[None], y_BN[None], block, False, row_scale_B, scale_in=scale_in_I, fragments=fragments)
    return rotated_BN, row_scale_B


def rotate_out(
    partial_SBN: torch.Tensor,
    row_scale_B: torch.Tensor | None,
    scale_out_O: torch.Tensor,
    bias_O: torch.Tensor | None,
    block: int,
    dtype: torch.dtype,
    columns: tuple[int, int] | None = None,
) -> torch.Tensor:
    """scale_out * (H^T (row_scale * sum over S of partial))[:O] + bias, computed in float32: y_BO [B, O] in `dtype`.

    The partial products are added in the order of S, so that the same ones give the same bits.

    partial_SBN: float32 [S, B, N]. columns: (first, count) of its columns that are this layer's; all where None.
    row_scale_B: float32 [B], 1 where None. scale_out_O: floating [O]; bias_O: floating [O]. Raises DeviceError, SpecError.
    """
    first, count = (0, partial_SBN.shape[-1]) if columns is None else columns
    y = rotate_out_group(partial_SBN, row_scale_B, [(first, count, block, scale_out_O, bias_O)], dtype)
    return y.view(partial_SBN.shape[1], len(scale_out_O))


Layer = tuple[int, int, int, torch.Tensor, torch.Tensor | None]
"""A layer whose product is some columns of a wider one: (first, count, block, scale_out, bias) as `rotate_out` has them."""


def rotate_out_group(
    partial_SBN: torch.Tensor, row_scale_B: torch.Tensor | None, layers: list[Layer], dtype: torch.dtype
) -> torch.Tensor:
    """`rotate_out` for each of several layers, in one launch for up to three that agree in count, block, outputs and dtypes.

    So gate and up take one launch; q, k and v take two where q is wider. Returns their y_BO one behind the other, in one
    dimension: a custom op may not return tensors that share memory. Raises DeviceError, SpecError.
    """
    rows = partial_SBN.shape[1]
    starts, end = [], 0
    alike: dict[tuple, list[int]] = {}
    for number, layer in enumerate(layers):
        _check_layer(partial_SBN, row_scale_B, layer)
        _, count, block, scale_out, bias = layer
        kind = count, block, scale_out.shape, scale_out.dtype, None if bias is None else bias.dtype
        alike.setdefault(kind, []).append(number)
        starts.append(end)
        end += rows * len(scale_out)
    y = partial_SBN.new_empty(end, dtype=dtype)
    for (count, block, (outputs,), *_), numbers in alike.items():
        for some in _evenly_spaced(numbers, starts):
            apart = starts[some[1]] - starts[some[0]] if len(some) > 1 else 0
            y_LBO = y.as_strided((len(some), rows, outputs), (apart, outputs, 1), starts[some[0]])
            firsts, _, _, scales_out, biases = zip(*(layers[number] for number in some), strict=True)
            x_SBN = partial_SBN[..., firsts[0] : firsts[0] + count]
            offsets = [first - firsts[0] for first in firsts]
            _launch(x_SBN, y_LBO, block, True, row_scale_B, offsets, scales_out=scales_out, biases=biases)
    return y


def _evenly_spaced(numbers: list[int], starts: list[int]) -> Iterator[list[int]]:
    """The layers, up to LAYERS at a time, whose places in y lie as far apart as those of the first two of them."""
    some = numbers[:1]
    for number in numbers[1:]:
        fits = len(some) == 1 or starts[number] - starts[some[-1]] == starts[some[1]] - starts[some[0]]
        if len(some) == LAYERS or not fits:
            yield some
            some = []
        some.append(number)
    yield some


def _check_layer(partial_SBN: torch.Tensor, row_scale_B: torch.Tensor | None, layer: Layer) -> None:
    first, count, block, scale_out_O, bias_O = layer
    device.check(partial=partial_SBN, row_scale=row_scale_B, scale_out=scale_out_O, bias=bias_O)
    if partial_SBN.ndim != 3 or partial_SBN.dtype != torch.float32 or len(partial_SBN) == 0:
        raise SpecError(f"partial is {partial_SBN.dtype} {tuple(partial_SBN.shape)}: it must be float32 [S, B, N], S >= 1")
    if row_scale_B is not None and (row_scale_B.shape != partial_SBN.shape[1:2] or row_scale_B.dtype != torch.float32):
        rows = partial_SBN.shape[1]
        raise SpecError(f"row_scale is {row_scale_B.dtype} {tuple(row_scale_B.shape)}: it must be float32 [{rows}]")
    width, outputs = partial_SBN.shape[2], scale_out_O.numel()
    if first < 0 or count < 0 or first + count > width or block < 1 or count % block or outputs > count:
        raise SpecError(f"columns {first}..{first + count} of {width} do not give {outputs} outputs in blocks of {block}")
    if scale_out_O.ndim != 1 or (bias_O is not None and bias_O.shape != scale_out_O.shape):
        shapes = tuple(scale_out_O.shape), None if bias_O is None else tuple(bias_O.shape)
        raise SpecError(f"scale_out and bias have shapes {shapes[0]} and {shapes[1]}: they must be [O] both")


@dataclass(frozen=True, slots=True)
class Plan:
    """How a launch is cut up. order, fold, power: M, F and P of Q_M (x) H_F (x) H_P.

    Without Q_M (order 1): tile: blocks of a row that a program takes. With it: tile: rows of Q_M, chunk: columns of Q_M at a
    time, rows: rows of x. warps: a program's. registers: most that a thread may have, on NVIDIA; 0 is the compiler's choice.
    """

    order: int
    fold: int
    power: int
    tile: int
    chunk: int
    rows: int
    warps: int
    registers: int = 0

    @property
    def radix_bits(self) -> int:
        """log2 of the butterflies' radix: a thread must hold all that a pass combines."""
        values = self.tile * self.rows * self.power // (32 * self.warps)
        return max(1, min(5, values.bit_length() - 1))

    @property
    def stages(self) -> int:
        """Chunks in flight; the F inputs of one are many loads already, and their copies would fill the shared memory."""
        return 2 if self.fold == 1 else 1


@lru_cache(maxsize=256)
def plan(block: int, blocks: int, few_rows: bool) -> Plan:
    """The plan for rows of `blocks` blocks, by shape alone: the same shapes give the same bits."""
    parts = factor(block)
    order, power = len(parts.dense), parts.power_of_two
    if order == 1:
        kept = min(power, LARGEST_TILE)
        tile = min(triton.next_power_of_2(blocks), LARGEST_TILE // kept) if kept == power else 1
        return Plan(1, power // kept, kept, tile, 0, 1, _warps(tile * kept, 16))
    if few_rows:
        tile = 32 if 16 < order <= 32 else 16
        fold = max(1, min(power // 32, triton.next_power_of_2(-(-block // DECODE_VALUES))))
        kept = power // fold
        rows = max(1, 16 // kept)  # a matrix instruction has no fewer columns
        chunk = max(16, min(triton.next_power_of_2(order), 128))
        return Plan(order, fold, kept, tile, chunk, rows, _warps(max(tile, chunk) * kept * rows, 16))
    tile = min(64, max(16, triton.next_power_of_2(order)))
    kept = min(power, 256 if tile <= 32 else 128)
    rows = max(1, 64 // kept)
    warps = _warps(tile * kept * rows, 32)
    # 128 registers let two programs of eight warps share a processor.
    return Plan(order, power // kept, kept, tile, 32 if tile == 64 else 16, rows, warps, 128 if warps == 8 else 0)


def _warps(values: int, values_per_thread: int) -> int:
    return min(16, max(1, values // (32 * values_per_thread)))


@lru_cache(maxsize=64)
def _dense(block: int, transpose: bool, tile: int, chunk: int, where: str) -> torch.Tensor:
    """sqrt(M) Q_M or its transpose, padded by zeros to whole tiles and chunks: bf16 where that is exact, +-1, else float32."""
    parts = factor(block)
    order = len(parts.dense)
    dense = (parts.dense.T if transpose else parts.dense) * sqrt(order)
    padded = torch.zeros(-(-order // tile) * tile, -(-order // chunk) * chunk, dtype=torch.float64)
    padded[:order, :order] = dense
    return padded.to(torch.float32 if parts.kind == "hartley" else torch.bfloat16).to(where)


def _launch(
    x_SBN: torch.Tensor,
    y_LBO: torch.Tensor,
    block: int,
    transpose: bool,
    row_scale: torch.Tensor | None = None,
    offsets: Sequence[int] = (0,),
    scale_in: torch.Tensor | None = None,
    scales_out: Sequence[torch.Tensor | None] = (None,),
    biases: Sequence[torch.Tensor | None] = (None,),
    fragments: bool = False,
) -> None:
    """Fill y_LBO for L layers, whose columns lie `offsets` from x_SBN's; and row_scale where there is a scale_in.

    y_LBO: rows may be parts of wider ones. fragments: its columns in the order of `fragments.fragments`.
    """
    layers, rows, outputs = y_LBO.shape
    if y_LBO.numel() == 0:
        return
    if x_SBN.stride(2) != 1:
        x_SBN = x_SBN.contiguous()
    tensors = [scale_in, row_scale, *_three(scales_out), *_three(biases)]
    tensors = [x_SBN, *(None if tensor is None else tensor.contiguous() for tensor in tensors), y_LBO]
    columns = [*offsets[1:], 0, 0][:2]
    parts, _, width = x_SBN.shape
    sizes = (parts, x_SBN.stride(1), x_SBN.stride(0), *columns, y_LBO.stride(1), y_LBO.stride(0), width, outputs)
    blocks = (width if scale_in is None else outputs) // block
    cut = plan(block, blocks, rows <= DECODE_ROWS)
    constants = _constants(cut, block, blocks, layers, scale_in is not None, fragments)
    with torch.cuda.device_of(y_LBO):  # Triton launches on the current device
        if cut.order == 1:
            grid = (layers * rows * -(-blocks // cut.tile) * cut.fold,)
            sylvester_kernel[grid](*tensors, *sizes, **constants, num_warps=cut.warps)
        else:
            dense = _dense(block, transpose, cut.tile, cut.chunk, str(y_LBO.device))
            grid = (layers * -(-rows // cut.rows) * blocks * cut.fold * -(-cut.order // cut.tile),)
            limit = {"maxnreg": cut.registers} if cut.registers and y_LBO.is_cuda and torch.version.hip is None else {}
            options = {"num_warps": cut.warps, "num_stages": cut.stages, **limit}
            dense_kernel[grid](*tensors, *sizes, dense, dense.shape[1], rows, **constants, **options)


def _three(tensors: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """The kernels take those of three layers, of which they read as many as there are layers."""
    fill = tensors[-1] if len(tensors) > 1 else None
    return [*tensors, fill, fill][:LAYERS]


def _constants(cut: Plan, block: int, blocks: int, layers: int, inward: bool, fragments: bool) -> dict[str, object]:
    # N times the root mean square of a row is this many times the root of the sum of squares of all scale_in * x UNIT.
    norm = block * sqrt(blocks)
    norm_bits = ceil(log2(norm))
    shared = {
        "LAYERS": layers,
        "BLOCKS": blocks,
        "FOLD": cut.fold,
        "POWER": cut.power,
        "POWER_BITS": cut.power.bit_length() - 1,
        "RADIX_BITS": cut.radix_bits,
        "TILE": cut.tile,
        "UNIT": 1 / sqrt(block) / (2**GUARD_BITS if inward else 1),
        "NORM": norm / 2**norm_bits,
        "NORM_BITS": norm_bits,
        "INWARD": inward,
        "FRAGMENTS": fragments,
    }
    if cut.order == 1:
        return shared
    return shared | {"ORDER": cut.order, "CHUNK": cut.chunk, "ROWS": cut.rows, "FLAT": factor(block).kind != "hartley"}


def compile_cases() -> Iterator["CompileCase"]:
    """Specialisations that differ in code: inward, outward, without and with Q_M, few rows, many, Hartley's factor."""
    for block, blocks in ((4096, 1), (14336, 1), (128, 112), (944, 1)):
        for inward in (True, False):
            yield _case(block, blocks, True, inward)
    for inward in (True, False):
        yield _case(14336, 1, False, inward)
        yield _case(11008, 1, False, inward)
        yield _case(18944, 1, False, inward)
    yield _case(1024, 1, True, False, layers=2)
    yield _case(14336, 1, True, False, layers=2)


def _case(block: int, blocks: int, few_rows: bool, inward: bool, layers: int = 1) -> "CompileCase":
    from qtipcli_kernels.compiling import CompileCase

    cut = plan(block, blocks, few_rows)
    kernel = sylvester_kernel if cut.order == 1 else dense_kernel
    constants = _constants(cut, block, blocks, layers, inward, fragments=inward and few_rows)
    types = {"x_ptr": "*fp16" if inward else "*fp32", "row_scale_ptr": "*fp32", "y_ptr": "*fp16"}
    types["dense_ptr"] = "*bf16" if constants.get("FLAT") else "*fp32"
    # Triton makes constants of what is None, and of integers that are 1.
    absent = ["scale_out_ptr", "bias_ptr"] if inward else ["scale_in_ptr"]
    if layers == 1:
        absent += [f"{tensor}_{layer}_ptr" for tensor in ("scale_out", "bias") for layer in (1, 2)]
    constants |= dict.fromkeys(absent) | ({"parts": 1} if inward else {})
    names = [name for name in kernel.arg_names if name not in constants]
    few = "few rows" if few_rows else "many rows"
    return CompileCase(
        name=f"hadamard {'in' if inward else 'out'}, {blocks} of {block}, {few}" + (f", {layers} layers" if layers > 1 else ""),
        kernel=kernel,
        signature={name: types.get(name, "*fp16" if name.endswith("_ptr") else "i32") for name in names},
        constexprs=constants,
        num_warps=cut.warps,
        num_stages=cut.stages,
        maxnreg=cut.registers or None,
        divisible=tuple(name for name in names if name not in ("parts", "rows")),
    )
