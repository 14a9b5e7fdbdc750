"""Owns checkpoints that are stored in 8 or 4 bits with scales beside them: which tensors they stand for, and their values.

The rest of the program sees the tensors that were quantized, under their own names, in bfloat16, and no scales. Sources of the
two formats: DeepSeek-V3's report (arXiv 2412.19437, section 3.3) and transformers' integration finegrained_fp8 for FP8; the OCP
Microscaling Formats specification v1.0 and the model card of gpt-oss for MXFP4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from qtipcli.errors import CorruptError, QtipError

METHODS = ("fp8", "mxfp4")
"""What a config calls them in `quant_method`."""

DTYPES = {"F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": getattr(torch, "float8_e8m0fnu", torch.uint8)}
"""Dtypes that only such checkpoints hold, by safetensors' names. A torch without the second has its bits, read alike."""

RESULT = torch.bfloat16
"""What is handed out: the dtype that such models were trained in."""

# E2M1: a sign bit, two of exponent, one of mantissa (OCP MX specification, table 5).
_FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

Part = Callable[[str, int | None], Tensor]
"""Reads a stored tensor by its name, or one row of its first dimension."""


class Stored(Protocol):
    """A tensor of the checkpoint, from its header."""

    @property
    def shard(self) -> Path: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...


@dataclass(frozen=True)
class Scaled:
    """A tensor that two stored ones stand for. shape: as the model has it. block: of one FP8 scale; None for MXFP4."""

    shard: Path
    shape: tuple[int, ...]
    values: str
    scales: str
    block: tuple[int, int] | None
    dtype: torch.dtype = RESULT

    def read(self, part: Part, row: int | None) -> Tensor:
        """Its values, or one row of its first dimension; of a stack of matrices only that one is read."""
        if self.block is None:
            return _from_mxfp4(part(self.values, row), part(self.scales, row))
        scales = part(self.scales, None)
        if row is None or scales.ndim < 3:
            whole = _from_fp8(part(self.values, None), scales, self.block)
            return whole if row is None else whole[row]
        return _from_fp8(part(self.values, row), scales[row], self.block)


def is_one(config: Mapping[str, Any]) -> bool:
    """Whether a config says that its checkpoint is stored by one of METHODS."""
    return _stated(config) is not None


def logical(stored: Mapping[str, Stored], config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What a checkpoint holds: its tensors by name, with a Scaled in place of each pair of values and scales.

    Raises CorruptError where scales do not fit, QtipError where there are none.
    """
    stated = _stated(config)
    block = stated.get("weight_block_size") if stated else None
    found: dict[str, Any] = {}
    used: set[str] = set()
    for tensor, what in stored.items():
        stem = tensor.removesuffix("_blocks")
        if what.dtype == torch.float8_e4m3fn:
            scales = _scales_of(tensor, stored, name)
            size = _fp8_block(tensor, what.shape, stored[scales].shape, block, name)
            found[tensor] = Scaled(what.shard, tuple(what.shape), tensor, scales, size)
            used.add(scales)
        elif stated and stem != tensor and f"{stem}_scales" in stored:
            shape = _mxfp4_shape(tensor, what, stored[f"{stem}_scales"], name)
            found[stem] = Scaled(what.shard, shape, tensor, f"{stem}_scales", None)
            used.add(f"{stem}_scales")
        else:
            found[tensor] = what
    return {tensor: what for tensor, what in found.items() if tensor not in used}


def _stated(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The quantization_config of one of METHODS, also in a nested text config."""
    for part in (config, *(part for part in config.values() if isinstance(part, dict))):
        stated = part.get("quantization_config")
        if isinstance(stated, dict) and stated.get("quant_method") in METHODS:
            return stated
    return None


def _scales_of(tensor: str, stored: Mapping[str, Stored], name: str) -> str:
    """The tensor of what an FP8 weight is to be multiplied by, whatever it is called."""
    for ending in ("_scale_inv", "_scale"):
        if f"{tensor}{ending}" in stored:
            return f"{tensor}{ending}"
    raise QtipError(
        f"{name}: {tensor} is stored in FP8, and there is no {tensor}_scale_inv", "start from the model with its bf16 weights"
    )


def _fp8_block(tensor: str, shape: tuple[int, ...], scales: tuple[int, ...], stated: object, name: str) -> tuple[int, int]:
    """Rows and columns that share a scale: all, those of a row, or those of a block of the stated size."""
    if math.prod(scales) == 1:
        return 1, 1
    blocks = [(1, shape[-1])] if len(shape) >= 2 and min(shape) > 0 else []
    if blocks and isinstance(stated, list) and len(stated) == 2 and all(type(size) is int and size > 0 for size in stated):
        blocks.insert(0, (stated[0], stated[1]))
    for rows, columns in blocks:
        if list(scales) == [*shape[:-2], math.ceil(shape[-2] / rows), math.ceil(shape[-1] / columns)]:
            return rows, columns
    raise CorruptError(
        f"{name}: the scales of {tensor} are {list(scales)}, its own shape {list(shape)}", "download the model again"
    )


def _mxfp4_shape(tensor: str, blocks: Stored, scales: Stored, name: str) -> tuple[int, ...]:
    """[E, O, I / 32, 16] bytes -> [E, I, O]: gpt-oss multiplies by its experts from the right."""
    fits = len(blocks.shape) >= 3 and blocks.shape[-1] == 16 and tuple(blocks.shape[:-1]) == tuple(scales.shape)
    if not fits or blocks.dtype != torch.uint8 or scales.dtype != torch.uint8:
        raise CorruptError(
            f"{name}: {tensor} is {list(blocks.shape)} and its scales are {list(scales.shape)}", "download the model again"
        )
    *stack, rows, groups, _ = blocks.shape
    return (*stack, groups * 32, rows)


def _from_fp8(values: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """values float8 [..., O, I], scales [..., ceil(O / o), ceil(I / i)] for blocks [o, i], or one for all."""
    plain, scales = values.to(torch.float32), _as_float(scales)
    if scales.numel() == 1:
        return plain.mul_(scales.reshape(())).to(RESULT)
    for axis, size in zip((-2, -1), block, strict=True):
        scales = scales.repeat_interleave(size, dim=axis).narrow(axis, 0, plain.shape[axis])
    return plain.mul_(scales).to(RESULT)


def _from_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """blocks uint8 [..., O, G, 16], each byte two values, the lower half first; scales uint8 [..., O, G], exponents of two."""
    table = torch.tensor([*_FP4_VALUES, *(-value for value in _FP4_VALUES)])
    both = torch.stack((table[(blocks & 15).long()], table[(blocks >> 4).long()]), dim=-1)
    weight = both.flatten(-2) * _as_float(scales.view(torch.uint8), exponents=True)[..., None]
    return weight.flatten(-2).transpose(-2, -1).to(RESULT).contiguous()


def _as_float(scales: Tensor, exponents: bool = False) -> Tensor:
    """float32; E8M0 is an exponent of two with a bias of 127 (OCP MX specification, section 5.4.1)."""
    if exponents or scales.dtype == DTYPES["F8_E8M0"]:
        return torch.exp2(scales.view(torch.uint8).to(torch.float32) - 127)
    return scales.to(torch.float32)
