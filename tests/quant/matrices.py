"""Owns the random matrices of these tests: weights, and Hessians of correlated inputs as a language model has them."""

from __future__ import annotations

import torch


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    """float32 of this shape, N(0, 1)."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated_hessian(inputs: int, seed: int = 0, dead: tuple[int, ...] = ()) -> torch.Tensor:
    """E[x x^T], float32 [I, I], of inputs on few strong directions; those in `dead` are always zero."""
    directions = gaussian(inputs, inputs, seed=seed) * torch.logspace(0, -2, inputs)
    x_NI = gaussian(4 * inputs, inputs, seed=seed + 1) @ directions.T
    x_NI[:, list(dead)] = 0.0
    return x_NI.T @ x_NI / len(x_NI)


def proxy_loss(weight_OI: torch.Tensor, rounded_OI: torch.Tensor, hessian_II: torch.Tensor) -> float:
    """tr(E H E^T) in float64."""
    error = (weight_OI - rounded_OI).double()
    return float(((error @ hessian_II.double()) * error).sum())
