"""Owns the correction of a matrix for inputs that are not the original's any more, because earlier layers were rounded.

Source: the least-squares problem of GPTAQ (arXiv 2504.02692, section 3), solved here in closed form before rounding, extended
to what the layer's output is added to, and judged on held-out tokens. Dimension key: O outputs, I inputs.
"""

import math
from dataclasses import dataclass

import torch

from qtipcli.quant.hessian import damp

DAMPINGS = (1e-2, 1e-1, 1.0)
"""Shares of the mean diagonal by which the corrected matrix is held to the original. The first is best where there is text
enough (docs/log.md, 2026-11-26); the others are for where it does not help on held-out tokens."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known of a layer on some tokens: sums over them, float32.

    hessian_II: of x^ x^^T, the layer's new input. missing_OI: of m x^^T, m being the original's value behind the layer less
    that of the model as it is. tokens: summed over.
    """

    hessian_II: torch.Tensor
    missing_OI: torch.Tensor
    tokens: int

    def without(self, other: "Evidence") -> "Evidence":
        """That of the tokens which are not in `other`."""
        return Evidence(
            self.hessian_II - other.hessian_II, self.missing_OI - other.missing_OI, self.tokens - other.tokens
        )  # fmt: skip


def corrected(weight_OI: torch.Tensor, seen: Evidence, heldout: Evidence) -> tuple[torch.Tensor, float]:
    """(the V that minimises E|W x^ + m - V x^|^2 + d |V - W|^2, so that it makes up for the missing m; its damping).

    seen: all tokens, of which `heldout` are some. The damping d is the least of DAMPINGS with which a correction made without
    the held-out tokens is better on them than none, as a share of the Hessian's mean diagonal; infinity, and W itself, where
    there is none or nothing to judge by. V = W + E[m x^^T] (E[x^ x^^T] + d 1)^-1, float32 [O, I].
    """
    if heldout.tokens and heldout.tokens < seen.tokens:
        fitted = seen.without(heldout)
        for damping in DAMPINGS:
            step_OI = _step(fitted, damping)
            # The held-out loss with the step less that without it: E|m - S x|^2 - E|m|^2, times the tokens.
            change = ((step_OI @ heldout.hessian_II - 2 * heldout.missing_OI) * step_OI).sum(dtype=torch.float64)
            if float(change) < 0:
                better_OI = (weight_OI.to(torch.float64) + _step(seen, damping).to(torch.float64)).to(torch.float32)
                if better_OI.square().sum().isfinite():  # inputs of a huge range ask for more than float32 can be scaled by
                    return better_OI, damping
    return weight_OI.to(torch.float32), math.inf


def _step(evidence: Evidence, damping: float) -> torch.Tensor:
    """E[m x^^T] (E[x^ x^^T] + d 1)^-1, float32 [O, I]."""
    damped = damp(evidence.hessian_II / evidence.tokens, damping)
    missing_IO = evidence.missing_OI.T.to(torch.float64) / evidence.tokens
    return torch.cholesky_solve(missing_IO, damped.cholesky_II).T.to(torch.float32)
