"""Owns what happens to a Hessian before it is factored: dead inputs, damping, and the ladder that never gives up."""

from dataclasses import dataclass

import torch

DAMPING_STEP = 10.0
"""Each failed factorisation multiplies the damping by this."""

SMALLEST_RETRY_DAMPING = 1e-6
"""Where the ladder starts from when the asked damping is zero."""


@dataclass(frozen=True, slots=True)
class DampedHessian:
    """A proxy Hessian that has a Cholesky factor.

    hessian_II: float64 [I, I], damped. cholesky_II: its lower factor. damping: the share of the mean diagonal that was
    added, as used. asked: as asked for; larger `damping` means that the ladder was climbed. dead_inputs: inputs that were
    never anything but zero.
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
    dominates.
    """
    hessian = hessian_II.to(torch.float64)
    hessian = (hessian + hessian.T) / 2
    diagonal = hessian.diagonal()
    dead = int((diagonal <= 0).sum())
    mean = float(diagonal.clamp(min=0).mean())
    if mean == 0.0:
        identity = torch.eye(len(hessian), dtype=torch.float64, device=hessian.device)
        return DampedHessian(identity, identity, damping, damping, dead)
    level = damping
    while True:
        damped = hessian.clone()
        damped.diagonal().add_(level * mean)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            return DampedHessian(damped, factor, level, damping, dead)
        level = max(level * DAMPING_STEP, SMALLEST_RETRY_DAMPING)
