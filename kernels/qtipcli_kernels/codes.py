"""Owns the codes: the map from a state to its V values, in torch, as the definition that every kernel is tested against.

Dimension key: L state bits, V values per step, S = 2^L states.
"""

from functools import lru_cache

import numpy as np
import torch

from qtipcli_kernels.spec import HYB_INDEX_BITS, SpecError, TrellisSpec

MASK_32 = 0xFFFF_FFFF

ONE_MAD_MULTIPLIER, ONE_MAD_INCREMENT = 34_038_481, 76_625_530
"""1MAD's linear congruential step (QTIP, section 4.1.1)."""

MUL1_MULTIPLIER = 0x83DC_D12D
"""EXL3's multiplier for a byte-sum code without increment (exllamav3, MIT)."""

BYTE_SUM_MEAN = 510.0
"""Mean of the sum of four uniform bytes, 4 * 255 / 2."""

BYTE_SUM_INVERSE_DEVIATION = float(np.float32(1 / 147.800537))
"""One over the standard deviation of that sum, sqrt(4 * (256^2 - 1) / 12), as the float32 that kernels multiply by."""

THREE_INST_MULTIPLIER, THREE_INST_INCREMENT = 89_226_354, 64_248_484
"""3INST's linear congruential step (QTIP, section 4.1.2)."""

MCG_MULTIPLIER = 0xCBAC_1FED
"""EXL3's multiplier for the same sum of two halves without increment (exllamav3, MIT)."""

HALF_PAIR_MASK, HALF_PAIR_XOR = 0x8FFF_8FFF, 0x3B60_3B60
"""Keep sign, two exponent bits and mantissa of two packed fp16, then set exponents near one (QTIP, section 4.1.2)."""

HYB_LUT_RMS = (15 / 16) ** 0.5
"""Root mean square that HYB's table is scaled to."""

LUT_SEED = 20241106
"""Seed of every default table, so that the same version makes the same table everywhere."""

HYB_KMEANS_SAMPLES, HYB_KMEANS_ROUNDS = 1 << 16, 60


def values(states: torch.Tensor, spec: TrellisSpec, lut: torch.Tensor | None = None) -> torch.Tensor:
    """The values that `states` emit.

    states: integer tensor of any shape [...], each in [0, 2^L).
    lut: HYB's [512, 2] or the `lut` code's [2^L, V] table; the default table where None. Ignored by computed codes.
    Returns float32 [..., V]. Source: QTIP section 4 and, for mul1 and mcg, exllamav3.
    """
    state = states.to(torch.int64)
    if spec.code in ("1mad", "mul1"):
        return _byte_sum(state, spec.code).unsqueeze(-1)
    if spec.code in ("3inst", "mcg"):
        return _half_pair_sum(state, spec.code).unsqueeze(-1)
    table = checked_lut(spec, lut).to(device=states.device, dtype=torch.float32)
    if spec.code == "lut":
        return table[state]
    return _hybrid(state, table, flip_second=spec.code == "hyb2")


def tabulate(spec: TrellisSpec, lut: torch.Tensor | None = None) -> torch.Tensor:
    """The whole code as a table, float32 [2^L, V]; row s holds what state s emits."""
    return values(torch.arange(spec.states), spec, lut)


def _byte_sum(state: torch.Tensor, code: str) -> torch.Tensor:
    multiplier, increment = (ONE_MAD_MULTIPLIER, ONE_MAD_INCREMENT) if code == "1mad" else (MUL1_MULTIPLIER, 0)
    x = (state * multiplier + increment) & MASK_32
    total = (x & 0xFF) + ((x >> 8) & 0xFF) + ((x >> 16) & 0xFF) + (x >> 24)
    return (total.to(torch.float32) - BYTE_SUM_MEAN) * BYTE_SUM_INVERSE_DEVIATION


def _half_pair_sum(state: torch.Tensor, code: str) -> torch.Tensor:
    multiplier, increment = (THREE_INST_MULTIPLIER, THREE_INST_INCREMENT) if code == "3inst" else (MCG_MULTIPLIER, 0)
    x = (state * multiplier + increment) & MASK_32
    x = (x & HALF_PAIR_MASK) ^ HALF_PAIR_XOR
    # Bit patterns above 2^15 are negative as int16; the wrap keeps them.
    high, low = (((half + 0x8000) & 0xFFFF) - 0x8000 for half in (x >> 16, x & 0xFFFF))
    # One fp16 addition, rounded to fp16, as the GPU's half add does it.
    total = high.to(torch.int16).view(torch.float16) + low.to(torch.int16).view(torch.float16)
    return total.to(torch.float32)


def _hybrid(state: torch.Tensor, table: torch.Tensor, *, flip_second: bool) -> torch.Tensor:
    h = (state * state + state) & MASK_32
    entry = table[(h >> (15 - HYB_INDEX_BITS)) & ((1 << HYB_INDEX_BITS) - 1)]
    sign_0 = 1.0 - 2.0 * ((h >> 15) & 1)
    sign_1 = 1.0 - 2.0 * (h >> 31) if flip_second else torch.ones_like(sign_0)
    return entry * torch.stack((sign_0, sign_1), dim=-1).to(torch.float32)


def lut_shape(spec: TrellisSpec) -> tuple[int, int] | None:
    """Shape of the table that `spec` reads, or None for a computed code."""
    if spec.code in ("hyb", "hyb2"):
        return (1 << HYB_INDEX_BITS, 2)
    if spec.code == "lut":
        return (spec.states, spec.weights_per_step)
    return None


def checked_lut(spec: TrellisSpec, lut: torch.Tensor | None) -> torch.Tensor:
    """`lut`, or the default table where None; SpecError when its shape is not the one that `spec` reads."""
    shape = lut_shape(spec)
    if shape is None:
        raise SpecError(f"code {spec.code} reads no table")
    if lut is None:
        lut = default_lut(spec)
    if tuple(lut.shape) != shape:
        raise SpecError(f"the table of code {spec.code} has shape {tuple(lut.shape)}: it must be {shape}")
    return lut


def default_lut(spec: TrellisSpec) -> torch.Tensor | None:
    """The seeded default table in fp16 (HYB [512, 2], `lut` [2^L, V]), or None for a computed code."""
    shape = lut_shape(spec)
    if shape is None:
        return None
    if spec.code == "lut":
        draws = np.random.Generator(np.random.PCG64(LUT_SEED)).standard_normal(shape)
        return torch.from_numpy(draws).to(torch.float16)
    return _hybrid_lut().clone()


@lru_cache(maxsize=1)
def _hybrid_lut() -> torch.Tensor:
    """k-means of a seeded Gaussian sample, folded by the sign of its first entry, which the code flips (QTIP, section 4.2).

    HYB2 has the same table: bit 31 of h is set for 29 % of the states, so the signs that it adds are no second folding.
    """
    generator = np.random.Generator(np.random.PCG64(LUT_SEED))
    sample = generator.standard_normal((HYB_KMEANS_SAMPLES, 2))
    sample[:, 0] = np.abs(sample[:, 0])
    points = torch.from_numpy(sample)
    # Starting from a random subset, Lloyd's iterations settle well before the last round.
    centres = points[: 1 << HYB_INDEX_BITS].clone()
    for _ in range(HYB_KMEANS_ROUNDS):
        # argmin of |p - c|^2 needs only |c|^2 / 2 - p.c; in pieces that stay in the cache
        half_norm = centres.square().sum(1) / 2
        nearest = torch.cat([torch.addmm(half_norm, piece, centres.T, alpha=-1).argmin(1) for piece in points.split(1024)])
        count = torch.bincount(nearest, minlength=len(centres)).clamp(min=1).unsqueeze(1)
        centres = torch.zeros_like(centres).index_add_(0, nearest, points) / count
    centres *= HYB_LUT_RMS / centres.square().mean().sqrt()
    # Sorted, so that the stored table does not depend on the order of the draws.
    order = np.lexsort((centres[:, 1].numpy(), centres[:, 0].numpy()))
    return centres[torch.from_numpy(order)].to(torch.float16)
