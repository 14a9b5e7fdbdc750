"""Owns the closed-form refit of row and column scales after rounding, with the walks fixed.

Not in the QTIP paper. Given the decoded matrix A, find c_out and c_in such that diag(c_out) A diag(c_in) is nearest to W in the
metric of the Hessian: tr(E H E^T), or with a Hessian on the output side as well tr(H_out E H E^T). Each half is a linear
least-squares problem. Dimension key: O outputs, I inputs.

`outputs` is None for the identity, or the output side's Hessians of layers that are stacked along O: float32 [O_l, O_l] each.
"""

from collections.abc import Sequence

import torch

REFIT_ROUNDS = 2
"""Alternating rounds, as in the design's measurements; not tuned further."""

COLUMN_RIDGE = 1e-6
"""Share of the mean diagonal added to the columns' normal equations: they are singular where an input is dead."""

ROW_RIDGE = 1e-4
"""The same for rows that the output side's Hessian couples; larger, as that Hessian is the noisier one."""

Outputs = Sequence[torch.Tensor] | None


def refit_rows(
    weight_OI: torch.Tensor, quantized_OI: torch.Tensor, hessian_II: torch.Tensor, outputs: Outputs = None
) -> torch.Tensor:
    """The c, float32 [O], that minimises the error of diag(c) Q; 1 where a row of Q is zero.

    Without `outputs` each row is on its own: c = (q H w^T) / (q H q^T). With them the rows of a layer are solved together:
    ((Q H Q^T) o H_out) c = rowsum of (Q H W^T) o H_out.
    """
    projected = quantized_OI @ hessian_II
    if outputs is None:
        energy = (projected * quantized_OI).sum(1, dtype=torch.float64)
        product = projected.mul_(weight_OI).sum(1, dtype=torch.float64)
        return torch.where(energy > 0, product / energy.clamp(min=1e-300), 1.0).to(torch.float32)
    sizes = [len(output_OO) for output_OO in outputs]
    parts = zip(projected.split(sizes), quantized_OI.split(sizes), weight_OI.split(sizes), outputs, strict=True)
    rows = []
    for p_OI, q_OI, w_OI, output_OO in parts:
        right = (p_OI @ w_OI.T).mul_(output_OO).sum(1)
        rows.append(_ridge_solution((p_OI @ q_OI.T).mul_(output_OO), right, ROW_RIDGE))
    return torch.cat(rows)


def refit_columns(
    weight_OI: torch.Tensor, quantized_OI: torch.Tensor, hessian_II: torch.Tensor, outputs: Outputs = None
) -> torch.Tensor:
    """The r, float32 [I], that minimises the error of Q diag(r).

    ((Q^T H_out Q) o H) r = rowsum over outputs of (H_out Q) o (W H).
    """
    weighted = quantized_OI
    if outputs is not None:
        parts = quantized_OI.split([len(output_OO) for output_OO in outputs])
        weighted = torch.cat([output_OO @ part for output_OO, part in zip(outputs, parts, strict=True)])
    right = (weight_OI @ hessian_II).mul_(weighted).sum(0, dtype=torch.float64)
    return _ridge_solution(weighted.T @ quantized_OI, right, COLUMN_RIDGE, hessian_II)


def _ridge_solution(gram: torch.Tensor, right: torch.Tensor, ridge: float, times: torch.Tensor | None = None) -> torch.Tensor:
    """float32 solution of normal equations, pulled towards 1, not 0: what the data say nothing about keeps its scale.

    gram: float32; its product with `times`, where that is given, is taken in float64, and factored in place.
    """
    square, right = torch.empty(gram.shape, dtype=torch.float64, device=gram.device).mT, right.to(torch.float64)
    square.copy_(gram)
    del gram  # the caller has no other use for it
    if times is not None:
        square.mul_(times)
    mean = square.diagonal().mean()
    if not float(mean) > 0:
        return torch.ones_like(right, dtype=torch.float32)
    square.diagonal().add_(ridge * mean)
    # torch.linalg.solve, without the copy that it makes of the matrix.
    pivots = torch.empty(len(square), dtype=torch.int32, device=square.device)
    torch.linalg.lu_factor(square, out=(square, pivots))
    return torch.linalg.lu_solve(square, pivots, (right + ridge * mean)[:, None])[:, 0].to(torch.float32)


def refit_scales(
    weight_OI: torch.Tensor,
    quantized_OI: torch.Tensor,
    hessian_II: torch.Tensor,
    rounds: int = REFIT_ROUNDS,
    outputs: Outputs = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Alternate the two halves; float32 in, (rows [O], columns [I]) out.

    Layers that share their input side are passed as one matrix, stacked along the outputs: one column scale serves them all.
    """
    rows = torch.ones(len(weight_OI), device=weight_OI.device)
    columns = torch.ones(weight_OI.shape[1], device=weight_OI.device)
    for _ in range(rounds):
        rows = refit_rows(weight_OI, quantized_OI * columns, hessian_II, outputs)
        columns = refit_columns(weight_OI, rows[:, None] * quantized_OI, hessian_II, outputs)
    rows = refit_rows(weight_OI, quantized_OI * columns, hessian_II, outputs)
    return rows, columns
