"""Owns what happens to a Hessian before it is factored: dead inputs, damping, and the ladder that never gives up.

A Hessian of I inputs is the largest thing that rounding works on, so there is one float64 copy of it at a time: it is made
symmetric, damped, turned (quant/incoherence.py) and factored where it lies. What is temporary is a share of it (`panels`).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

DAMPING_STEP = 10.0
"""Each failed factorisation multiplies the damping by this."""

SMALLEST_RETRY_DAMPING = 1e-6
"""Where the ladder starts from when the asked damping is zero."""

PANELS = 16
"""Into so many parts a matrix is cut that is changed in place: what is temporary is a sixteenth of it."""

LEAST_PANEL = 64
"""Rows of a panel at the least: the transform of fewer rows takes another way, with other last bits (hadamard/cpu.py)."""


@dataclass(frozen=True, slots=True)
class Damping:
    """What a Hessian needs to have a Cholesky factor.

    level: the share of the mean diagonal that is added. asked: as asked for; a larger `level` means that the ladder was
    climbed. mean: of the diagonal, without what is negative; 0 where the identity stands for the Hessian. dead_inputs: inputs
    that were never anything but zero.
    """

    level: float
    asked: float
    mean: float
    dead_inputs: int

    def apply_(self, hessian_II: torch.Tensor) -> torch.Tensor:
        """Make `hessian_II` symmetric and damped, in place and as if in float64; returns it."""
        if self.mean == 0.0:
            hessian_II.zero_().diagonal().fill_(1.0)
            return hessian_II
        symmetrize_(hessian_II)
        diagonal = hessian_II.diagonal()
        diagonal.copy_(diagonal.to(torch.float64) + self.level * self.mean)
        return hessian_II


@dataclass(frozen=True, slots=True)
class DampedHessian:
    """A proxy Hessian that has a Cholesky factor.

    hessian_II: float64 [I, I], damped. cholesky_II: its lower factor. The others as in `Damping`.
    """

    hessian_II: torch.Tensor
    cholesky_II: torch.Tensor
    damping: float
    asked: float
    dead_inputs: int


def damp(hessian_II: torch.Tensor, damping: float) -> DampedHessian:
    """Add `damping` times the mean diagonal (QTIP and QuIP#: 1e-2), more where the factorisation fails.

    hessian_II: symmetric positive semidefinite [I, I], any float dtype; all zero (a layer that saw only zeros) stands for the
    identity. The result is symmetric to the bit. Never fails on a finite matrix: at the top of the ladder the diagonal
    dominates. Takes two float64 matrices; `factored` takes one.
    """
    cholesky_II, used = factored(lambda: hessian_II.to(torch.float64, copy=True), damping)
    damped_II = used.apply_(hessian_II.to(torch.float64, copy=True))
    return DampedHessian(damped_II, cholesky_II, used.level, used.asked, used.dead_inputs)


def factored(
    make: Callable[[], torch.Tensor], damping: float, look: Callable[[torch.Tensor], None] | None = None
) -> tuple[torch.Tensor, Damping]:
    """(the lower Cholesky factor of a Hessian that is damped as `damp` says, what that took).

    make: gives the Hessian as a new float64 [I, I], which is written over; asked again each time that the factorisation fails.
    look: shown the damped Hessian, symmetric and row-major, before it is factored. The factor is column-major, in the place of
    what `make` gave.
    """
    level = damping
    while True:
        square_II = symmetrize_(make())
        diagonal = square_II.diagonal()
        dead = int((diagonal <= 0).sum())
        used = Damping(level, damping, float(diagonal.clamp(min=0).mean()), dead)
        if used.mean == 0.0:
            square_II.zero_().diagonal().fill_(1.0)
        else:
            diagonal.add_(level * used.mean)
        # A symmetric matrix is its own transpose: the same bytes can be read, and written, along rows and along columns.
        rows_II = square_II if square_II.is_contiguous() else square_II.mT
        if look is not None:
            look(rows_II)
        if used.mean == 0.0:
            return rows_II.mT, used
        factor_II, failed = rows_II.mT, torch.empty((), dtype=torch.int32, device=square_II.device)
        torch.linalg.cholesky_ex(factor_II, out=(factor_II, failed))
        if not int(failed):
            return factor_II, used
        level = max(level * DAMPING_STEP, SMALLEST_RETRY_DAMPING)
        del square_II, diagonal, rows_II, factor_II  # before the next one is made


def symmetrize_(square_II: torch.Tensor) -> torch.Tensor:
    """Put the mean of it and its transpose, taken in float64, in its place; returns it."""
    parts = panels(len(square_II))
    for number, rows in enumerate(parts):
        for columns in parts[number:]:
            mean = (square_II[rows, columns].to(torch.float64) + square_II[columns, rows].T.to(torch.float64)) / 2
            square_II[rows, columns] = mean
            square_II[columns, rows] = mean.T
    return square_II


def panels(count: int) -> list[slice]:
    """range(count) in at most PANELS parts of LEAST_PANEL or more."""
    parts = max(1, min(PANELS, count // LEAST_PANEL))
    return [slice(count * part // parts, count * (part + 1) // parts) for part in range(parts)]
