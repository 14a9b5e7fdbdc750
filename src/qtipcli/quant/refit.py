"""Owns the closed-form refit of row and column scales after rounding, with the walks fixed.

Not in the QTIP paper. Given the decoded matrix A, find c_out and c_in such that diag(c_out) A diag(c_in) is nearest to W in the
metric of the Hessian. Each half is a linear least-squares problem. Dimension key: O outputs, I inputs.
"""

import torch

REFIT_ROUNDS = 2
"""Alternating rounds, as in the design's measurements; not tuned further."""

COLUMN_RIDGE = 1e-6
"""Share of the mean diagonal added to the columns' normal equations: they are singular where an input is dead."""


def refit_rows(weight_OI: torch.Tensor, quantized_OI: torch.Tensor, hessian_II: torch.Tensor) -> torch.Tensor:
    """Per output row q of `quantized_OI` and w of `weight_OI`: (q H w^T) / (q H q^T), float32 [O]; 1 where q is zero."""
    projected = quantized_OI @ hessian_II
    energy = (projected * quantized_OI).sum(1, dtype=torch.float64)
    product = (projected * weight_OI).sum(1, dtype=torch.float64)
    return torch.where(energy > 0, product / energy.clamp(min=1e-300), 1.0).to(torch.float32)


def refit_columns(weight_OI: torch.Tensor, quantized_OI: torch.Tensor, hessian_II: torch.Tensor) -> torch.Tensor:
    """The r, float32 [I], that minimises the error of Q diag(r): ((Q^T Q) o H) r = rowsum over outputs of Q o (W H)."""
    gram = (quantized_OI.T @ quantized_OI).to(torch.float64) * hessian_II.to(torch.float64)
    right = (quantized_OI * (weight_OI @ hessian_II)).sum(0, dtype=torch.float64)
    mean = gram.diagonal().mean()
    if not float(mean) > 0:
        return torch.ones_like(right, dtype=torch.float32)
    # The ridge pulls towards 1, not 0: an input that the data say nothing about keeps its scale.
    gram.diagonal().add_(COLUMN_RIDGE * mean)
    right += COLUMN_RIDGE * mean
    solution = torch.linalg.solve(gram, right)
    return solution.to(torch.float32)


def refit_scales(
    weight_OI: torch.Tensor, quantized_OI: torch.Tensor, hessian_II: torch.Tensor, rounds: int = REFIT_ROUNDS
) -> tuple[torch.Tensor, torch.Tensor]:
    """Alternate the two halves; float32 in, (rows [O], columns [I]) out.

    Layers that share their input side are passed as one matrix, stacked along the outputs: one column scale serves them all.
    """
    rows = torch.ones(len(weight_OI), device=weight_OI.device)
    columns = torch.ones(weight_OI.shape[1], device=weight_OI.device)
    for _ in range(rounds):
        rows = refit_rows(weight_OI, quantized_OI * columns, hessian_II)
        columns = refit_columns(weight_OI, rows[:, None] * quantized_OI, hessian_II)
    rows = refit_rows(weight_OI, quantized_OI * columns, hessian_II)
    return rows, columns
