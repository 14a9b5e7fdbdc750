"""Owns the correction of a matrix for inputs that are not the original's any more, because earlier layers were rounded.

Source: the least-squares problem of GPTAQ (arXiv 2504.02692, section 3), solved here in closed form before rounding, and
extended to what the layer's output is added to. Dimension key: O outputs, I inputs.
"""

import torch

from qtipcli.quant.hessian import damp

CORRECTION_DAMPING = 1e-2
"""Share of the mean diagonal by which the corrected matrix is held to the original (docs/log.md, 2026-11-26)."""


def corrected(weight_OI: torch.Tensor, hessian_II: torch.Tensor, missing_OI: torch.Tensor) -> torch.Tensor:
    """The V that minimises E|W x^ + m - V x^|^2 + d |V - W|^2: it makes up for the missing m as nearly as it can.

    weight_OI: W. hessian_II: E[x^ x^^T] of the new input x^. missing_OI: E[m x^^T], m being the original's output less this
    layer's on x^. V = W + E[m x^^T] (E[x^ x^^T] + d 1)^-1, float32 [O, I], with d CORRECTION_DAMPING times the Hessian's mean
    diagonal, more where it cannot be factored.
    """
    damped = damp(hessian_II, CORRECTION_DAMPING)
    step_IO = torch.cholesky_solve(missing_OI.T.to(torch.float64), damped.cholesky_II)
    return (weight_OI.to(torch.float64) + step_IO.T).to(torch.float32)
