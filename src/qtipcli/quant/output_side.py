"""Owns the Hessian of a layer's outputs: how it is damped, and whether held-out text says that it helps at all.

With it a layer is rounded under tr(H_out E H_in E^T): YAQA's objective (arXiv 2505.22988) with K-FAC's factors, H_in = E[x x^T]
and H_out = E[g g^T] of the gradient g of the loss at the layer's output. Dimension key: O outputs, P the same padded.
"""

import math
from dataclasses import dataclass

import torch

from qtipcli.quant.hessian import DampedHessian, damp
from qtipcli.quant.incoherence import random_signs, rotate_hessian
from qtipcli.quant.ldlq import block_ldl
from qtipcli.quant.transform import Transform

DAMPINGS = (1e-2, 1e-1, 1.0)
"""Shares of the mean diagonal that are tried; a Hessian that helps with none of them is not used."""


@dataclass(frozen=True, slots=True)
class OutputHessian:
    """What the loss makes of errors in a layer's outputs.

    hessian_OO: float32 [O, O]. damping: share of its mean diagonal to add before it is factored; infinity leaves nothing but
    that diagonal, which is rounding without it.
    """

    hessian_OO: torch.Tensor
    damping: float

    def damped(self) -> DampedHessian:
        """As `hessian.damp` does it."""
        if math.isfinite(self.damping):
            return damp(self.hessian_OO, self.damping)
        mean = self.hessian_OO.diagonal().mean(dtype=torch.float64)
        return damp(mean * torch.eye(len(self.hessian_OO), dtype=torch.float64, device=self.hessian_OO.device), 0.0)


def choose_damping(fitted_OO: torch.Tensor, heldout_OO: torch.Tensor) -> tuple[float, float]:
    """(the damping of DAMPINGS, or infinity, that is best on held-out text; the loss with it over the loss without feedback).

    Both are E[g g^T], of different text. Feedback with the factor L of one turns white rounding noise F into L^-T F, which
    costs tr(H L^-T L^-1) under the other, H, and tr(H) without feedback. Taken in a basis that is turned as for rounding.
    """
    signs = random_signs(len(fitted_OO), 0, "output side").to(fitted_OO.device)
    judge_PP = rotate_hessian(heldout_OO.to(torch.float64), signs, Transform()).to(torch.float32)
    plain = float(judge_PP.trace())
    if not plain > 0:
        return math.inf, 1.0
    found = {math.inf: 1.0}
    fitted_PP = rotate_hessian(fitted_OO.to(torch.float64), signs, Transform())
    for damping in DAMPINGS:
        # A multiple of the identity is the same in every orthonormal basis.
        lower = block_ldl(damp(fitted_PP, damping).cholesky_II).to(torch.float32)
        half = torch.linalg.solve_triangular(lower, judge_PP, upper=False)
        found[damping] = float(torch.linalg.solve_triangular(lower, half.T, upper=False).trace()) / plain
    best = min(found, key=found.__getitem__)
    return best, found[best]
