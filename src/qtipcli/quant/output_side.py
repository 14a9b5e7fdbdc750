"""Owns the Hessian of a layer's outputs: how it is damped, and whether held-out text says that it helps at all.

With it a layer is rounded under tr(H_out E H_in E^T): YAQA's objective (arXiv 2505.22988) with K-FAC's factors, H_in = E[x x^T]
and H_out = E[g g^T] of the gradient g of the loss at the layer's output. Dimension key: O outputs, P the same padded.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch

from qtipcli.quant.hessian import Damping, factored
from qtipcli.quant.incoherence import random_signs, rotate_hessian_
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

    def matrix(self) -> torch.Tensor:
        """What is rounded under, before it is damped: new, float64 [O, O]."""
        if math.isfinite(self.damping):
            return self.hessian_OO.to(torch.float64, copy=True)
        mean = self.hessian_OO.diagonal().mean(dtype=torch.float64)
        return torch.eye(len(self.hessian_OO), dtype=torch.float64, device=self.hessian_OO.device).mul_(mean)

    def damped(self) -> Damping:
        """What `matrix` needs to have a factor."""
        return factored(self.matrix, self.damping if math.isfinite(self.damping) else 0.0)[1]

    def metric(self, used: Damping) -> torch.Tensor:
        """What errors are weighed by: float32 [O, O], damped as `used` says."""
        # Made symmetric in the dtype that it is known in; rounded to float32 either way.
        known_OO = self.matrix() if not math.isfinite(self.damping) else self.hessian_OO.clone()
        return used.apply_(known_OO).to(torch.float32)


def choose_damping(fitted_OO: torch.Tensor, heldout_OO: torch.Tensor) -> tuple[float, float]:
    """(the damping of DAMPINGS, or infinity, that is best on held-out text; the loss with it over the loss without feedback).

    Both are E[g g^T], of different text. Feedback with the factor L of one turns white rounding noise F into L^-T F, which
    costs tr(H L^-T L^-1) under the other, H, and tr(H) without feedback. Taken in a basis that is turned as for rounding: anew
    for each damping, since its float64 copy is the largest thing here.
    """
    signs = random_signs(len(fitted_OO), 0, "output side").to(fitted_OO.device)
    judge_PP = _turned(heldout_OO, signs)
    del heldout_OO
    judge_PP = torch.empty(judge_PP.shape, device=judge_PP.device).copy_(judge_PP)  # row-major
    plain = float(judge_PP.trace())
    if not plain > 0:
        return math.inf, 1.0
    found = {math.inf: 1.0}
    for damping in DAMPINGS:
        # A multiple of the identity is the same in every orthonormal basis.
        turned = partial(_turned, fitted_OO, signs)
        found[damping] = _trace_with(block_ldl(factored(turned, damping)[0], torch.float32), judge_PP) / plain
    best = min(found, key=found.__getitem__)
    return best, found[best]


def _turned(hessian_OO: torch.Tensor, signs_O: torch.Tensor) -> torch.Tensor:
    """New, float64 [P, P]."""
    return rotate_hessian_(hessian_OO.to(torch.float64, copy=True), signs_O, Transform())


def _trace_with(lower_PP: torch.Tensor, judge_PP: torch.Tensor) -> float:
    """tr(L^-1 H L^-T) for the block factor L and H, `judge_PP`."""
    half = torch.linalg.solve_triangular(lower_PP, judge_PP, upper=False).T
    torch.linalg.solve_triangular(lower_PP, half, upper=False, out=half)
    return float(half.trace())
