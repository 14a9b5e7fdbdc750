"""Owns which orthonormal matrix stands for "Hadamard" at each size: Q_M (x) H_{2^p}, with Q_M made by formula, never by table.

Q_M is a Hadamard matrix over sqrt(M) wherever a Paley construction reaches a suitable order (R. E. A. C. Paley, "On orthogonal
matrices", 1933), else the discrete Hartley transform of the odd part, which exists at every order, needs no seed, and has no
entry above sqrt(2 / m): nearly as flat.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
import torch

LARGEST_DENSE_ORDER = 1024
"""Orders of Q_M that are looked for; a dense factor costs M multiplications for each value transformed."""


@dataclass(frozen=True, slots=True)
class Factorisation:
    """n = M 2^p. dense: Q_M, orthonormal float64 [M, M]. power_of_two: 2^p. kind: "sylvester", "paley" or "hartley"."""

    dense: torch.Tensor
    power_of_two: int
    kind: str


@lru_cache(maxsize=64)
def factor(n: int) -> Factorisation:
    """The factors for dimension n, any positive integer; the smallest reachable M."""
    power = n & -n
    odd = n // power
    if odd == 1:
        return Factorisation(torch.ones(1, 1, dtype=torch.float64), n, "sylvester")
    order = odd
    while order <= min(n, LARGEST_DENSE_ORDER) and n % order == 0:
        matrix = paley(order)
        if matrix is not None:
            return Factorisation(torch.from_numpy(matrix / np.sqrt(order)), n // order, "paley")
        order *= 2
    return Factorisation(torch.from_numpy(hartley(odd)), power, "hartley")


def sylvester(n: int) -> torch.Tensor:
    """The Hadamard matrix of Sylvester's construction over sqrt(n), float64 [n, n], n a power of two."""
    index = np.arange(n)
    parity = np.bitwise_count(index[:, None] & index[None, :]) & 1
    return torch.from_numpy((1.0 - 2.0 * parity) / np.sqrt(n))


def hartley(m: int) -> np.ndarray:
    """The discrete Hartley transform, cas(2 pi i j / m) / sqrt(m) with cas = cos + sin: orthonormal and symmetric, [m, m]."""
    angle = 2 * np.pi / m * (np.outer(np.arange(m), np.arange(m)) % m)
    return (np.cos(angle) + np.sin(angle)) / np.sqrt(m)


def paley(order: int) -> np.ndarray | None:
    """A Hadamard matrix of +-1, float64 [order, order], by Paley's first or second construction, or None."""
    if order % 4 == 0 and (order - 1) % 4 == 3:
        residues = jacobsthal(order - 1)
        if residues is not None:
            matrix = np.ones((order, order))
            matrix[1:, 0] = -1
            matrix[1:, 1:] = residues
            # I + S, where S is the skew matrix with a zero diagonal.
            np.fill_diagonal(matrix, 1)
            return matrix
    if order % 4 == 0 and (order // 2 - 1) % 4 == 1:
        residues = jacobsthal(order // 2 - 1)
        if residues is not None:
            conference = np.ones((order // 2, order // 2))
            conference[1:, 1:] = residues
            np.fill_diagonal(conference, 0)
            return np.kron(conference, [[1, 1], [1, -1]]) + np.kron(np.eye(order // 2), [[1, -1], [-1, -1]])
    return None


def jacobsthal(q: int) -> np.ndarray | None:
    """chi(a - b) over the field of q elements, chi the quadratic character: float64 [q, q]; None where q is no prime power."""
    prime = next((p for p in range(2, q + 1) if q % p == 0), 0)
    degree = round(np.log(q) / np.log(prime)) if prime else 0
    if not prime or prime**degree != q:
        return None
    # Elements are polynomials over the integers mod p: the digits of 0 .. q - 1 in base p, lowest first.
    digits = np.stack([np.arange(q) // prime**power % prime for power in range(degree)], axis=1)
    weights = prime ** np.arange(degree)
    squares = _squares(digits, prime)
    character = np.full(q, -1.0)
    character[squares @ weights] = 1.0
    character[0] = 0.0
    difference = (digits[:, None, :] - digits[None, :, :]) % prime @ weights
    return character[difference]


def _squares(digits: np.ndarray, prime: int) -> np.ndarray:
    """The square of each polynomial, reduced by an irreducible one; the same shape as `digits`."""
    count, degree = digits.shape
    squared = np.zeros((count, 2 * degree - 1), np.int64)
    for i, j in product(range(degree), repeat=2):
        squared[:, i + j] += digits[:, i] * digits[:, j]
    squared %= prime
    if degree == 1:
        return squared
    tail = _irreducible_tail(prime, degree)
    for high in range(2 * degree - 2, degree - 1, -1):
        # x^degree = -tail, so x^high = -x^(high - degree) tail.
        squared[:, high - degree : high] -= squared[:, high : high + 1] * tail
    return squared[:, :degree] % prime


def _irreducible_tail(prime: int, degree: int) -> np.ndarray:
    """The low coefficients of the first monic irreducible polynomial of this degree, lowest first.

    Degrees 2 and 3, all that orders up to 1024 need of odd primes but for 3^4, 3^5, 3^6 and 5^4: irreducible is then the same
    as having no root. For the others the test by factors is used too.
    """
    for tail in product(range(prime), repeat=degree):
        if not _has_factor(np.array((*tail, 1)), prime):
            return np.array(tail)
    raise AssertionError(f"no irreducible polynomial of degree {degree} mod {prime}")  # there always is one


def _has_factor(polynomial: np.ndarray, prime: int) -> bool:
    """Whether a monic polynomial of at most half the degree divides it, mod p."""
    degree = len(polynomial) - 1
    for size in range(1, degree // 2 + 1):
        for tail in product(range(prime), repeat=size):
            rest = polynomial.copy()
            for high in range(degree, size - 1, -1):
                rest[high - size : high + 1] -= rest[high] * np.array((*tail, 1))
                rest %= prime
            if not rest[:size].any():
                return True
    return False
