"""Owns the cheap rounding that stands for the real one: what noise a layer would get at a rate, without the cost of getting it.

The real trellis has up to 2^16 states; the probe's has 2^10, in the same basis, with the scale searched and refitted as there,
and on wide layers a sample of the rows, which are rounded independently of one another. What the larger trellis gains is taken
to be the same for every matrix, and measured on Gaussian tiles. Dimension key: O outputs, I inputs; P and J the same padded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from qtipcli.quant.hessian import damp
from qtipcli.quant.incoherence import random_signs, rotate_hessian, rotate_weight, rotate_weight_back
from qtipcli.quant.ldlq import block_ldl, relative_proxy_loss, round_ldlq
from qtipcli.quant.matrix import RoundingSettings
from qtipcli.quant.refit import refit_scales
from qtipcli.quant.scale import SEARCH_STATE_BITS, rms, search_scale, source_scale, tile_rounder
from qtipcli_kernels.codes import default_lut, tabulate
from qtipcli_kernels.spec import TILE_WEIGHTS, TrellisSpec

PROBE_ROWS = 128
"""Rows of a layer that tell its distortion at a rate; the refit's columns overfit them by one part in as many."""

GAUSSIAN_TILES = 32
"""Tiles that tell two trellises apart: a tile's error varies by 9 %, so that the ratio is known to 2 %."""

GAUSSIAN_SEED = 20260731


@dataclass(frozen=True, slots=True)
class Probe:
    """What the cheap rounding made of one layer.

    noisy_OI: float32, rounded as a whole at the noise's rate, and noise_loss: its relative proxy loss.
    losses: trellis -> relative proxy loss expected of the real rounding with it.
    """

    noisy_OI: torch.Tensor
    noise_loss: float
    losses: dict[TrellisSpec, float]


def probe_group(
    weights: Mapping[str, torch.Tensor],
    hessian_II: torch.Tensor,
    noise: TrellisSpec,
    candidates: Sequence[TrellisSpec],
    settings: RoundingSettings,
) -> dict[str, Probe]:
    """Round layers that see the same input cheaply: each whole once, and a sample of it with every candidate.

    weights: name -> [O, I], any float dtype. hessian_II: E[x x^T] of the shared input, on the device where the work is done.
    noise, candidates: trellises of the real size. Deterministic.
    """
    rounder = _CheapRounder(list(weights), hessian_II, settings)
    whole = {name: weight.detach().to(hessian_II.device, torch.float32) for name, weight in weights.items()}
    noisy = rounder.round(whole, noise)
    samples = {name: _spread(weight) for name, weight in whole.items()}
    losses: dict[str, dict[TrellisSpec, float]] = {name: {} for name in whole}
    for spec in candidates:
        gain = trellis_gain(spec)
        for name, rounded in rounder.round(samples, spec).items():
            losses[name][spec] = gain * rounder.loss(samples[name], rounded)
    return {name: Probe(noisy[name], rounder.loss(whole[name], noisy[name]), losses[name]) for name in whole}


def small_trellis(spec: TrellisSpec) -> TrellisSpec:
    """The probe's trellis in the place of `spec`: the same code and rate with at most 2^10 states."""
    return replace(spec, state_bits=max(spec.bits_per_step, min(spec.state_bits, SEARCH_STATE_BITS)))


@lru_cache
def trellis_gain(spec: TrellisSpec) -> float:
    """Mean squared error of `spec` over that of its small trellis, for Gaussian weights at the table's scale; 1 or less."""
    small = small_trellis(spec)
    if small == spec:
        return 1.0
    generator = torch.Generator().manual_seed(GAUSSIAN_SEED)
    tiles = torch.randn(GAUSSIAN_TILES, TILE_WEIGHTS, generator=generator) * source_scale(spec)
    errors = []
    for each in (spec, small):
        table_SV = tabulate(each, default_lut(each))
        scaled = tiles * rms(table_SV)
        _, values = tile_rounder(each, table_SV)(scaled)
        errors.append(float((scaled - values).square().mean(dtype=torch.float64)))
    return errors[0] / errors[1]


class _CheapRounder:
    """Rounds layers that share an input with small trellises, as `matrix.round_group` does with those that are stored.

    The sample of a layer is a layer of its own: its output side is turned by itself.
    """

    def __init__(self, names: Sequence[str], hessian_II: torch.Tensor, settings: RoundingSettings) -> None:
        self._settings = settings
        signs_I = random_signs(hessian_II.shape[0], settings.seed, f"{names[0]}.in").to(hessian_II.device)
        damped = damp(hessian_II, settings.damping)
        turned = damp(rotate_hessian(damped.hessian_II, signs_I, settings.transform), 0.0)
        self._signs_I = signs_I
        self._lower_JJ = block_ldl(turned.cholesky_II).to(torch.float32)
        self._hessian_JJ = turned.hessian_II.to(torch.float32)
        self._metric_II = damped.hessian_II.to(torch.float32)

    def round(self, weights: Mapping[str, torch.Tensor], spec: TrellisSpec) -> dict[str, torch.Tensor]:
        """name -> what float32 [O, I] becomes with the small trellis of `spec`, refitted as the settings say."""
        rounded = {name: self._round(name, weight_OI, small_trellis(spec)) for name, weight_OI in weights.items()}
        if not self._settings.refit:
            return rounded
        stacked, decoded = torch.cat(list(weights.values())), torch.cat(list(rounded.values()))
        rows, columns = refit_scales(stacked, decoded, self._metric_II)
        parts = (rows[:, None] * decoded * columns).split([len(weight) for weight in weights.values()])
        return dict(zip(weights, parts, strict=True))

    def loss(self, weight_OI: torch.Tensor, rounded_OI: torch.Tensor) -> float:
        """Relative proxy loss in the damped Hessian's metric, as the quantize stage reports it."""
        return relative_proxy_loss(weight_OI, rounded_OI, self._metric_II)

    def _round(self, name: str, weight_OI: torch.Tensor, spec: TrellisSpec) -> torch.Tensor:
        settings = self._settings
        lut = default_lut(spec)
        signs_O = random_signs(len(weight_OI), settings.seed, f"{name}.out").to(weight_OI.device)
        turned_PJ = rotate_weight(weight_OI, signs_O, self._signs_I, settings.transform)
        weight_rms = rms(turned_PJ)
        scale = settings.scale if settings.scale is not None else source_scale(spec)
        if settings.search and settings.scale is None and weight_rms > 0:
            scale = search_scale(turned_PJ, self._lower_JJ, self._hessian_JJ, spec, lut)
        table_SV = tabulate(spec, lut).to(weight_OI.device)
        step_size = weight_rms / (scale * rms(table_SV))
        _, rounded_PJ = round_ldlq(turned_PJ / (step_size or 1.0), self._lower_JJ, tile_rounder(spec, table_SV))
        return rotate_weight_back(rounded_PJ * step_size, signs_O, self._signs_I, settings.transform)


def _spread(weight_OI: torch.Tensor) -> torch.Tensor:
    """At most PROBE_ROWS rows, evenly spread over the layer."""
    rows = min(len(weight_OI), PROBE_ROWS)
    return weight_OI[torch.arange(rows, device=weight_OI.device) * len(weight_OI) // rows]
