"""Owns the ratio of the weights' rms to the code's: the table by code and rate, and the search that refines it for a matrix.

The best ratio balances the code's granularity against its reach. For independent Gaussian weights it depends on rate and code
alone; under LDLQ the fed-back error widens what is rounded, by an amount that depends on the Hessian, and the best ratio drops.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from qtipcli.quant.ldlq import RoundTiles, relative_proxy_loss, round_ldlq
from qtipcli_kernels.codes import lut_shape, tabulate
from qtipcli_kernels.dispatch import encode
from qtipcli_kernels.spec import TILE, TrellisSpec

COMPUTED_SCALES = {
    1.0: 1.15,
    1.5: 1.07,
    2.0: 1.0,
    2.5: 0.97,
    3.0: 0.95,
    3.5: 0.92,
    4.0: 0.90,
    5.0: 0.85,
    6.0: 0.80,
    7.0: 0.76,
    8.0: 0.72,
}
"""Bits per weight -> best ratio of a Gaussian source at L = 16, measured at whole rates up to 4 (method.md, section 3).

Between them interpolated; above 4 bits extrapolated and not measured: there the search decides.
"""

HYBRID_SCALES = {1.0: 1.15, 1.5: 1.07, 2.0: 1.0, 2.5: 0.95, 3.0: 0.90, 3.5: 0.85, 4.0: 0.80}
"""The same for the hybrid codes, whose table of 512 pairs reaches less far."""

SEARCH_FACTORS = (0.70, 0.78, 0.86, 0.94, 1.02)
"""Shares of the table's ratio that the search tries.

Most matrices of the materials lie between 0.86 and 0.98. At 4 bits a few end at an edge, where a wider grid might help.
"""

SEARCH_STATE_BITS = 10
"""L of the trellis that the search rounds with: 64 times cheaper than 16. That its best ratio serves there is assumed."""

SEARCH_ROWS = 8 * TILE
"""Rows that the search rounds. Rows are rounded independently of one another, so a part stands for the whole."""


Encode = Callable[[torch.Tensor, TrellisSpec, torch.Tensor, bool], torch.Tensor]
"""What dispatch.encode does: tiles, trellis, table, whether fast -> states. Another one may share the tiles with others."""


def source_scale(spec: TrellisSpec) -> float:
    """The table's ratio of rms(weights) to rms(code) for this code and rate."""
    return (HYBRID_SCALES if spec.code in ("hyb", "hyb2") else COMPUTED_SCALES)[spec.bits]


def tile_rounder(spec: TrellisSpec, table_SV: torch.Tensor, fast: bool = False, encode: Encode = encode) -> RoundTiles:
    """Rounds tiles to their nearest walks."""

    def round_tiles(tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        states = encode(tiles, spec, table_SV, fast)
        return states, table_SV[states.to(torch.int64)].reshape(tiles.shape)

    return round_tiles


def rms(values: torch.Tensor) -> float:
    """Root mean square, in float64."""
    return float(values.square().mean(dtype=torch.float64).sqrt())


def search_scale(
    weight_PJ: torch.Tensor,
    lower_JJ: torch.Tensor,
    hessian_JJ: torch.Tensor,
    spec: TrellisSpec,
    lut: torch.Tensor | None,
    encode: Encode = encode,
) -> float:
    """The ratio with the least proxy loss after LDLQ: a grid around the table's, and the parabola through its best three.

    weight_PJ: float32, in the basis that is rounded. lower_JJ: `ldlq.block_ldl` of hessian_JJ. Deterministic.
    """
    small = replace(spec, state_bits=max(spec.bits_per_step, min(spec.state_bits, SEARCH_STATE_BITS)))
    # The `lut` code's table belongs to one L; the smaller trellis takes the default one of its own.
    table_SV = tabulate(small, lut if lut is not None and tuple(lut.shape) == lut_shape(small) else None).to(weight_PJ.device)
    sample_PJ = _spread_rows(weight_PJ)
    round_tiles, code_rms, weight_rms = tile_rounder(small, table_SV, encode=encode), rms(table_SV), rms(weight_PJ)
    ratios = [factor * source_scale(spec) for factor in SEARCH_FACTORS]
    step_sizes = [weight_rms / (ratio * code_rms) for ratio in ratios]
    # Rows are independent, so all ratios are tried in one pass.
    _, rounded = round_ldlq(torch.cat([sample_PJ / step_size for step_size in step_sizes]), lower_JJ, round_tiles)
    losses = [
        relative_proxy_loss(sample_PJ, part * step_size, hessian_JJ)
        for part, step_size in zip(rounded.chunk(len(ratios)), step_sizes, strict=True)
    ]
    return _least(ratios, losses)


def _spread_rows(weight_PJ: torch.Tensor) -> torch.Tensor:
    """At most SEARCH_ROWS rows, in whole tiles evenly spread over the matrix."""
    tile_rows = len(weight_PJ) // TILE
    kept = min(tile_rows, SEARCH_ROWS // TILE)
    chosen = torch.arange(kept) * tile_rows // kept
    return weight_PJ.reshape(tile_rows, TILE, -1)[chosen].reshape(kept * TILE, -1)


def _least(points: list[float], values: list[float]) -> float:
    """Where a function sampled at evenly spaced points is least, by the parabola through the lowest and its neighbours."""
    lowest = min(range(len(points)), key=values.__getitem__)
    if lowest in (0, len(points) - 1):
        return points[lowest]
    before, at, after = values[lowest - 1 : lowest + 2]
    curvature = before - 2 * at + after
    shift = 0.5 * (before - after) / curvature if curvature > 0 else 0.0
    return points[lowest] + shift * (points[1] - points[0])
