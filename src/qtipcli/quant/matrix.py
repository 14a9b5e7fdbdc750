"""Owns the rounding of one group of linear layers that share their input: from weights and Hessian to packed matrices.

Dimension key: O outputs, I inputs; P and J the same padded to multiples of 16; T steps of a walk.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from qtipcli.errors import QtipError
from qtipcli.quant.hessian import DampedHessian, damp
from qtipcli.quant.incoherence import random_signs, rotate_hessian, rotate_weight, rotate_weight_back
from qtipcli.quant.ldlq import block_ldl, relative_proxy_loss, round_ldlq, round_two_sided
from qtipcli.quant.output_side import OutputHessian
from qtipcli.quant.refit import refit_scales
from qtipcli.quant.scale import Encode, rms, search_scale, source_scale, tile_rounder
from qtipcli.quant.transform import Transform
from qtipcli_kernels.codes import tabulate
from qtipcli_kernels.dispatch import encode
from qtipcli_kernels.packing import pack
from qtipcli_kernels.spec import TrellisSpec

SAFE_STEP_EXPONENTS = (-9, 4)
"""log2 of step sizes whose rows keep all their digits in fp16, with room for refitted rows 32 times off the mean either way."""


@dataclass(frozen=True, slots=True)
class RoundingSettings:
    """How matrices are rounded.

    transform: of both sides; transform_out: of the output side where that has another.
    scale: rms of the weights over rms of the code; None takes the table's value for the code and rate, and search refines it.
    damping: share of the Hessian's mean diagonal added to it. refit: closed-form scales after rounding.
    fast: the encoder's shorter first pass. seed: of the random signs.
    """

    transform: Transform
    damping: float
    refit: bool
    scale: float | None = None
    search: bool = True
    fast: bool = False
    seed: int = 0
    transform_out: Transform | None = None


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """One rounded layer as it is stored, and what is known of it.

    trellis int32 [P/16, J/16 * words]; scale_in fp16 [I] and scale_out fp16 [O], signs included.
    relative_proxy_loss: of the stored matrix. unrefitted_loss: before the refit. damping: as used.
    divergence: tr(H_out E H_in E^T) / 2 of the stored matrix, the KL divergence in nats a token that it alone costs by second
    order; None where it was rounded without a Hessian of its outputs.
    """

    trellis: torch.Tensor
    scale_in: torch.Tensor
    scale_out: torch.Tensor
    relative_proxy_loss: float
    unrefitted_loss: float
    scale: float
    damping: float
    dead_inputs: int
    divergence: float | None = None


def round_group(
    weights: Mapping[str, torch.Tensor],
    hessian_II: torch.Tensor,
    specs: Mapping[str, TrellisSpec],
    settings: RoundingSettings,
    luts: Mapping[str, torch.Tensor | None],
    outputs: Mapping[str, OutputHessian] | None = None,
    encode: Encode = encode,
) -> dict[str, PackedMatrix]:
    """Round layers that see the same input; they share its signs, its transform and their scale_in.

    weights: name -> [O, I], any float dtype. hessian_II: E[x x^T] of the shared input, on the same device, where the work is
    done. specs: name -> trellis. luts: name -> the code's table, None where it is computed. outputs: name -> Hessian of its
    outputs, of every layer or of none: their scales weigh the layers against each other in the shared scale_in. encode: what
    encodes the tiles.
    Deterministic: the same arguments give the same bits, whatever was rounded before. What is packed is on the CPU.
    """
    names = list(weights)
    signs_I = random_signs(hessian_II.shape[0], settings.seed, f"{names[0]}.in").to(hessian_II.device)
    damped = damp(hessian_II, settings.damping)
    # Adding a multiple of the identity commutes with the orthonormal turn; the factor does not, and is taken in the new basis.
    turned = damp(rotate_hessian(damped.hessian_II, signs_I, settings.transform), 0.0)
    basis = _Basis(signs_I, block_ldl(turned.cholesky_II).to(torch.float32), turned.hessian_II.to(torch.float32))
    metric_II = damped.hessian_II.to(torch.float32)

    sides = {name: outputs[name].damped() for name in names} if outputs else {}
    layers = {
        name: _round(
            name, weights[name].detach().to(torch.float32), specs[name], luts[name], basis, settings, sides.get(name), encode
        )
        for name in names
    }  # fmt: skip
    stacked_weight = torch.cat([layer.weight_OI for layer in layers.values()])
    stacked_rounded = torch.cat([layer.decoded_OI for layer in layers.values()])
    if settings.refit:
        metrics = [side.hessian_II.to(torch.float32) for side in sides.values()] or None
        rows, columns = refit_scales(stacked_weight, stacked_rounded, metric_II, outputs=metrics)
    else:
        rows, columns = stacked_weight.new_ones(len(stacked_weight)), stacked_weight.new_ones(len(signs_I))
    row_parts = rows.split([len(layer.weight_OI) for layer in layers.values()])
    shift = _shift([layer.step_size for layer in layers.values()])
    return {
        name: _store(layer, row_part, columns, signs_I, shift, metric_II, damped, outputs[name] if outputs else None)
        for (name, layer), row_part in zip(layers.items(), row_parts, strict=True)
    }


@dataclass(frozen=True, slots=True)
class _Basis:
    """What the layers of a group share: input signs, and in the turned basis the block factor and the Hessian."""

    signs_I: torch.Tensor
    lower_JJ: torch.Tensor
    hessian_JJ: torch.Tensor


@dataclass(frozen=True, slots=True)
class _RoundedLayer:
    """A layer between rounding and storing; `decoded_OI` is in the original basis, step size and signs included."""

    weight_OI: torch.Tensor
    decoded_OI: torch.Tensor
    trellis: torch.Tensor
    signs_O: torch.Tensor
    step_size: float
    scale: float


def _round(
    name: str,
    weight_OI: torch.Tensor,
    spec: TrellisSpec,
    lut: torch.Tensor | None,
    basis: _Basis,
    settings: RoundingSettings,
    side: DampedHessian | None,
    encode: Encode,
) -> _RoundedLayer:
    signs_O = random_signs(len(weight_OI), settings.seed, f"{name}.out").to(weight_OI.device)
    turned_PJ = rotate_weight(weight_OI, signs_O, basis.signs_I, settings.transform, settings.transform_out)
    weight_rms = rms(turned_PJ)
    if not math.isfinite(weight_rms):
        raise QtipError(f"{name} holds values whose squares overflow float32", "leave the layer as it is: --skip")
    scale = settings.scale if settings.scale is not None else source_scale(spec)
    if settings.search and settings.scale is None and weight_rms > 0:
        scale = search_scale(turned_PJ, basis.lower_JJ, basis.hessian_JJ, spec, lut, encode)
    table_SV = tabulate(spec, lut).to(weight_OI.device)
    # A matrix of zeros gets step size 0, which makes its scale_out 0, whatever walk is stored.
    step_size = weight_rms / (scale * rms(table_SV))
    target_PJ, round_tiles = turned_PJ / (step_size or 1.0), tile_rounder(spec, table_SV, settings.fast, encode)
    if side is None:
        states, rounded_PJ = round_ldlq(target_PJ, basis.lower_JJ, round_tiles)
    else:
        transform_out = settings.transform_out or settings.transform
        turned_side = damp(rotate_hessian(side.hessian_II, signs_O, transform_out), 0.0)
        states, rounded_PJ = round_two_sided(target_PJ, basis.lower_JJ, block_ldl(turned_side.cholesky_II), round_tiles)
    words = pack(states.reshape(-1, spec.steps), spec)
    turn = (settings.transform, settings.transform_out)
    decoded_OI = rotate_weight_back(rounded_PJ * step_size, signs_O, basis.signs_I, *turn)
    return _RoundedLayer(weight_OI, decoded_OI, words.reshape(len(states), -1), signs_O, step_size, scale)


def _store(
    layer: _RoundedLayer,
    rows: torch.Tensor,
    columns: torch.Tensor,
    signs_I: torch.Tensor,
    shift: float,
    metric_II: torch.Tensor,
    damped: DampedHessian,
    output: OutputHessian | None,
) -> PackedMatrix:
    scale_in = (columns * signs_I * shift).to(torch.float16)
    scale_out = (rows * layer.step_size * layer.signs_O / shift).to(torch.float16)
    # What the stored fp16 scales make of the decoded matrix, signs and step size taken out again.
    stored_rows = scale_out.to(torch.float32) * layer.signs_O / (layer.step_size or 1.0)
    stored_columns = scale_in.to(torch.float32) * signs_I
    stored_OI = stored_rows[:, None] * layer.decoded_OI * stored_columns
    return PackedMatrix(
        trellis=layer.trellis,
        scale_in=scale_in.cpu(),
        scale_out=scale_out.cpu(),
        relative_proxy_loss=relative_proxy_loss(layer.weight_OI, stored_OI, metric_II),
        unrefitted_loss=relative_proxy_loss(layer.weight_OI, layer.decoded_OI, metric_II),
        scale=layer.scale,
        damping=damped.damping,
        dead_inputs=damped.dead_inputs,
        divergence=None if output is None else _divergence(layer.weight_OI - stored_OI, metric_II, output.hessian_OO),
    )


def _divergence(error_OI: torch.Tensor, hessian_II: torch.Tensor, hessian_OO: torch.Tensor) -> float:
    """tr(H_out E H_in E^T) / 2."""
    return 0.5 * float(((hessian_OO @ error_OI @ hessian_II) * error_OI).sum(dtype=torch.float64))


def _shift(step_sizes: list[float]) -> float:
    """The power of two that moves from scale_out to scale_in: 1, unless fp16 would lose digits of very small or large steps."""
    exponents = [math.log2(step_size) for step_size in step_sizes if step_size > 0]
    if not exponents:
        return 1.0
    middle = sum(exponents) / len(exponents)
    low, high = SAFE_STEP_EXPONENTS
    return 1.0 if low <= middle <= high else 2.0 ** round(middle / 2)
