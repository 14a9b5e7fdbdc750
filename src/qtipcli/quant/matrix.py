"""Owns the rounding of one group of linear layers that share their input: from weights and Hessian to packed matrices.

Dimension key: O outputs, I inputs; P and J the same padded to multiples of 16; T steps of a walk.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch

from qtipcli.errors import QtipError
from qtipcli.quant.hessian import Damping, factored
from qtipcli.quant.incoherence import random_signs, rotate_hessian_, rotate_weight, rotate_weight_back
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


PACKED_PARTS = 16
"""Into so many parts a layer's walks are cut to be packed."""


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
    weights: dict[str, torch.Tensor],
    hessian_II: torch.Tensor,
    specs: Mapping[str, TrellisSpec],
    settings: RoundingSettings,
    luts: Mapping[str, torch.Tensor | None],
    outputs: Mapping[str, OutputHessian] | None = None,
    encode: Encode = encode,
    consume: bool = False,
) -> dict[str, PackedMatrix]:
    """Round layers that see the same input; they share its signs, its transform and their scale_in.

    weights: name -> [O, I], any float dtype. hessian_II: E[x x^T] of the shared input, on the same device, where the work is
    done. specs: name -> trellis. luts: name -> the code's table, None where it is computed. outputs: name -> Hessian of its
    outputs, of every layer or of none: their scales weigh the layers against each other in the shared scale_in. It is asked
    for each of them three times, and none is kept: a mapping that reads them from a file keeps them out of memory.
    encode: what encodes the tiles. consume: `weights` is emptied and `hessian_II` written over, which saves a copy of each.
    Deterministic: the same arguments give the same bits, whatever was rounded before. What is packed is on the CPU.
    """
    names = list(weights)
    signs_I = random_signs(hessian_II.shape[0], settings.seed, f"{names[0]}.in").to(hessian_II.device)
    # Of this factor nothing is used but that it exists: it says how much damping is needed.
    used = factored(lambda: hessian_II.to(torch.float64, copy=True), settings.damping)[1]
    basis = _basis(hessian_II, used, signs_I, settings)
    metric_II = used.apply_(hessian_II if consume else hessian_II.clone()).to(torch.float32)
    weight_OI, parts = _stacked(weights, consume)
    layers: dict[str, _RoundedLayer] = {}
    sides: dict[str, Damping] = {}
    decoded_OI = weight_OI.new_empty(weight_OI.shape) if len(names) > 1 else None
    for name, part in parts.items():
        output = outputs[name] if outputs else None
        if output is not None:
            sides[name] = output.damped()
        layer, decoded = _round(
            name, weight_OI[part], specs[name], luts[name], basis, settings, output, sides.get(name), encode, name == names[-1]
        )
        layers[name] = layer
        if decoded_OI is None:
            decoded_OI = decoded
        else:
            decoded_OI[part] = decoded
        del output, decoded
    del basis
    assert decoded_OI is not None, "a group has at least one layer"
    rows, columns = weight_OI.new_ones(len(weight_OI)), weight_OI.new_ones(len(signs_I))
    if settings.refit:
        metrics = [outputs[name].metric(side) for name, side in sides.items()] if outputs else None
        rows, columns = refit_scales(weight_OI, decoded_OI, metric_II, outputs=metrics)
        del metrics
    shift = _shift([layer.step_size for layer in layers.values()])
    shared = _Shared(columns, signs_I, shift, metric_II, used)
    return {
        name: _store(layers[name], weight_OI[part], decoded_OI[part], rows[part], shared, outputs[name] if outputs else None)
        for name, part in parts.items()
    }


def _stacked(weights: dict[str, torch.Tensor], consume: bool) -> tuple[torch.Tensor, dict[str, slice]]:
    """(all layers along the outputs, float32; the rows of each)."""
    sizes = {name: len(weight) for name, weight in weights.items()}
    ends = dict(zip(sizes, accumulate(sizes.values()), strict=True))
    parts = {name: slice(ends[name] - size, ends[name]) for name, size in sizes.items()}
    first, *others = weights.values()
    if others:
        stacked = first.new_empty(sum(sizes.values()), first.shape[1], dtype=torch.float32)
        del first, others
        for name, part in parts.items():
            stacked[part] = weights[name].detach()
            if consume:
                del weights[name]
        return stacked, parts
    if consume:
        weights.clear()
    return first.detach().to(torch.float32), parts


@dataclass(slots=True)
class _Basis:
    """What the layers of a group share: input signs, and in the turned basis the block factor and the Hessian.

    hessian_JJ: None where no scale is searched, and from the last search on.
    """

    signs_I: torch.Tensor
    lower_JJ: torch.Tensor
    hessian_JJ: torch.Tensor | None


def _basis(hessian_II: torch.Tensor, used: Damping, signs_I: torch.Tensor, settings: RoundingSettings) -> _Basis:
    # Adding a multiple of the identity commutes with the orthonormal turn; the factor does not, and is taken in the new basis.
    seen: list[torch.Tensor] = []

    def turned() -> torch.Tensor:
        seen.clear()
        return rotate_hessian_(used.apply_(hessian_II.to(torch.float64, copy=True)), signs_I, settings.transform)

    is_searched = settings.search and settings.scale is None
    factor_JJ, _ = factored(turned, 0.0, (lambda square_JJ: seen.append(square_JJ.to(torch.float32))) if is_searched else None)
    return _Basis(signs_I, block_ldl(factor_JJ, torch.float32), seen.pop() if seen else None)


@dataclass(frozen=True, slots=True)
class _RoundedLayer:
    """A layer between rounding and storing, but for its matrices."""

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
    output: OutputHessian | None,
    used: Damping | None,
    encode: Encode,
    is_last: bool,
) -> tuple[_RoundedLayer, torch.Tensor]:
    """(the layer, what it decodes to in the original basis, step size and signs included).

    output, used: its output side and how that is damped. is_last: no layer after it needs the Hessian of the basis.
    """
    signs_O = random_signs(len(weight_OI), settings.seed, f"{name}.out").to(weight_OI.device)
    turned_PJ = rotate_weight(weight_OI, signs_O, basis.signs_I, settings.transform, settings.transform_out)
    weight_rms = rms(turned_PJ)
    if not math.isfinite(weight_rms):
        raise QtipError(f"{name} holds values whose squares overflow float32", "leave the layer as it is: --skip")
    scale = settings.scale if settings.scale is not None else source_scale(spec)
    if basis.hessian_JJ is not None and weight_rms > 0:
        scale = search_scale(turned_PJ, basis.lower_JJ, basis.hessian_JJ, spec, lut, encode)
    if is_last:
        basis.hessian_JJ = None
    table_SV = tabulate(spec, lut).to(weight_OI.device)
    # A matrix of zeros gets step size 0, which makes its scale_out 0, whatever walk is stored.
    step_size = weight_rms / (scale * rms(table_SV))
    target_PJ, round_tiles = turned_PJ.div_(step_size or 1.0), tile_rounder(spec, table_SV, settings.fast, encode)
    if output is None or used is None:
        states, rounded_PJ = round_ldlq(target_PJ, basis.lower_JJ, round_tiles)
    else:
        lower_PP = _output_lower(output, used, signs_O, settings.transform_out or settings.transform)
        states, rounded_PJ = round_two_sided(target_PJ, basis.lower_JJ, lower_PP, round_tiles)
        del lower_PP
    del turned_PJ, target_PJ
    words = _packed(states, spec)
    del states
    turn = (settings.transform, settings.transform_out)
    decoded_OI = rotate_weight_back(rounded_PJ.mul_(step_size), signs_O, basis.signs_I, *turn)
    return _RoundedLayer(words, signs_O, step_size, scale), decoded_OI


def _output_lower(output: OutputHessian, used: Damping, signs_O: torch.Tensor, transform: Transform) -> torch.Tensor:
    """The block factor of the output side in the turned basis, float32 [P, P]."""
    factor_PP, _ = factored(lambda: rotate_hessian_(used.apply_(output.matrix()), signs_O, transform), 0.0)
    return block_ldl(factor_PP, torch.float32)


def _packed(states: torch.Tensor, spec: TrellisSpec) -> torch.Tensor:
    """int32 [P/16, J/16, T] -> [P/16, J/16 * words], in parts: bits stand in a byte each on their way."""
    parts = states.tensor_split(min(PACKED_PARTS, len(states)))
    return torch.cat([pack(part.reshape(-1, spec.steps), spec).reshape(len(part), -1) for part in parts])


@dataclass(frozen=True, slots=True)
class _Shared:
    """What the stored layers of a group share: scales of columns, signs, a power of two, and the metric of their losses."""

    columns: torch.Tensor
    signs_I: torch.Tensor
    shift: float
    metric_II: torch.Tensor
    used: Damping


def _store(
    layer: _RoundedLayer,
    weight_OI: torch.Tensor,
    decoded_OI: torch.Tensor,
    rows: torch.Tensor,
    shared: _Shared,
    output: OutputHessian | None,
) -> PackedMatrix:
    scale_in = (shared.columns * shared.signs_I * shared.shift).to(torch.float16)
    scale_out = (rows * layer.step_size * layer.signs_O / shared.shift).to(torch.float16)
    # What the stored fp16 scales make of the decoded matrix, signs and step size taken out again.
    stored_rows = scale_out.to(torch.float32) * layer.signs_O / (layer.step_size or 1.0)
    stored_columns = scale_in.to(torch.float32) * shared.signs_I
    stored_OI = (stored_rows[:, None] * decoded_OI).mul_(stored_columns)
    return PackedMatrix(
        trellis=layer.trellis,
        scale_in=scale_in.cpu(),
        scale_out=scale_out.cpu(),
        relative_proxy_loss=relative_proxy_loss(weight_OI, stored_OI, shared.metric_II),
        unrefitted_loss=relative_proxy_loss(weight_OI, decoded_OI, shared.metric_II),
        scale=layer.scale,
        damping=shared.used.level,
        dead_inputs=shared.used.dead_inputs,
        divergence=None if output is None else _divergence(weight_OI - stored_OI, shared.metric_II, output.hessian_OO),
    )


def _divergence(error_OI: torch.Tensor, hessian_II: torch.Tensor, hessian_OO: torch.Tensor) -> float:
    """tr(H_out E H_in E^T) / 2."""
    return 0.5 * float((hessian_OO @ error_OI @ hessian_II).mul_(error_OI).sum(dtype=torch.float64))


def _shift(step_sizes: list[float]) -> float:
    """The power of two that moves from scale_out to scale_in: 1, unless fp16 would lose digits of very small or large steps."""
    exponents = [math.log2(step_size) for step_size in step_sizes if step_size > 0]
    if not exponents:
        return 1.0
    middle = sum(exponents) / len(exponents)
    low, high = SAFE_STEP_EXPONENTS
    return 1.0 if low <= middle <= high else 2.0 ** round(middle / 2)
