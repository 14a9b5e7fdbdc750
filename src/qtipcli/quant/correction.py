"""Owns the correction of a matrix for inputs that are not the original's any more, because earlier layers were rounded.

Source: the least-squares problem of GPTAQ (arXiv 2504.02692, section 3), solved here in closed form before rounding, extended
to what the layer's output is added to, and judged on held-out tokens. Dimension key: O outputs, I inputs.
"""

import math
from dataclasses import dataclass

import torch

from qtipcli.quant.hessian import factored, panels

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


def corrected(weight_OI: torch.Tensor, seen: Evidence, heldout: Evidence) -> tuple[torch.Tensor, float]:
    """(the V that minimises E|W x^ + m - V x^|^2 + d |V - W|^2, so that it makes up for the missing m; its damping).

    seen: all tokens, of which `heldout` are some. The damping d is the least of DAMPINGS with which a correction made without
    the held-out tokens is better on them than none, as a share of the Hessian's mean diagonal; infinity, and W itself, where
    there is none or nothing to judge by. V = W + E[m x^^T] (E[x^ x^^T] + d 1)^-1, float32 [O, I].
    """
    if heldout.tokens and heldout.tokens < seen.tokens:
        for damping in DAMPINGS:
            step_OI = _step(seen, damping, heldout)
            # The held-out loss with the step less that without it: E|m - S x|^2 - E|m|^2, times the tokens.
            change = (step_OI @ heldout.hessian_II).sub_(2 * heldout.missing_OI).mul_(step_OI).sum(dtype=torch.float64)
            del step_OI
            if float(change) < 0:
                better_OI = _sum(weight_OI, _step(seen, damping))
                flat = better_OI.flatten()
                if torch.dot(flat, flat).isfinite():  # inputs of a huge range ask for more than float32 can be scaled by
                    return better_OI, damping
    return weight_OI.to(torch.float32), math.inf


def _step(seen: Evidence, damping: float, heldout: Evidence | None = None) -> torch.Tensor:
    """E[m x^^T] (E[x^ x^^T] + d 1)^-1, float32 [O, I], of the tokens that are seen and not in `heldout`."""
    tokens = seen.tokens - (heldout.tokens if heldout else 0)

    def chosen(sums: torch.Tensor, left_out: torch.Tensor | None, part: slice) -> torch.Tensor:
        return sums[part] if left_out is None else sums[part] - left_out[part]

    def hessian() -> torch.Tensor:
        made_II = torch.empty(seen.hessian_II.shape, dtype=torch.float64, device=seen.hessian_II.device)
        for part in panels(len(made_II)):
            made_II[part] = chosen(seen.hessian_II, heldout and heldout.hessian_II, part) / tokens
        return made_II

    factor_II, _ = factored(hessian, damping)
    missing_OI = torch.empty(seen.missing_OI.shape, dtype=torch.float64, device=seen.missing_OI.device)
    for part in panels(len(missing_OI)):
        missing_OI[part] = chosen(seen.missing_OI, heldout and heldout.missing_OI, part).to(torch.float64) / tokens
    missing_IO = missing_OI.T
    # Forth and back, in place: what cholesky_solve does with copies.
    torch.linalg.solve_triangular(factor_II, missing_IO, upper=False, out=missing_IO)
    torch.linalg.solve_triangular(factor_II.mT, missing_IO, upper=True, out=missing_IO)
    return missing_OI.to(torch.float32)


def _sum(weight_OI: torch.Tensor, step_OI: torch.Tensor) -> torch.Tensor:
    """In float64, rounded to float32, in the place of `step_OI`."""
    for part in panels(len(step_OI)):
        step_OI[part] = weight_OI[part].to(torch.float64) + step_OI[part].to(torch.float64)
    return step_OI
