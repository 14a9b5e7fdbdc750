"""The orthonormal transform: its factors by their defining identities, the kernel against the explicit matrix."""

import math

import pytest
import torch

from qtipcli_kernels.hadamard import cpu, factored, reference
from qtipcli_kernels.hadamard.factor import factor, hartley, jacobsthal, sylvester
from qtipcli_kernels.spec import SpecError

MODEL_SIZES = (5632, 4864, 18944, 29568, 9728, 17408, 25600, 4544, 11008, 704, 352, 768, 288, 576, 14336, 13824, 16, 48, 80)
"""Hidden and intermediate sizes of released models, most of them on no list of Hadamard orders."""

SIZES = (16, 48, 80, 288, 352, 13 * 16, 704)
"""Powers of two, both Paley constructions, prime powers, and 13 * 16, whose smallest order is a Paley one of 52."""

FLOAT32_ERRORS = 2
"""House rule: no worse than twice plain torch in the same dtype, against float64."""


def is_orthonormal(matrix):
    """Rounding of M-term sums of products near 1 / M: a few units in the last place of 1, far below any wrong entry."""
    return torch.allclose(matrix @ matrix.T, torch.eye(len(matrix), dtype=matrix.dtype), rtol=0, atol=1e-13)


@pytest.mark.parametrize("n", MODEL_SIZES)
def test_sizes_of_models_have_hadamard_factors(n):
    parts = factor(n)
    order = len(parts.dense)
    assert order * parts.power_of_two == n
    assert parts.kind in ("sylvester", "paley")
    assert is_orthonormal(parts.dense)
    # Every entry has the same size: +-1 over the square root of the order.
    torch.testing.assert_close(parts.dense.abs(), torch.full_like(parts.dense, order**-0.5), rtol=1e-15, atol=0)


def test_every_multiple_of_sixteen_has_flat_orthonormal_factors():
    kinds = set()
    for n in range(16, 2049, 16):
        parts = factor(n)
        kinds.add(parts.kind)
        assert len(parts.dense) * parts.power_of_two == n
        assert is_orthonormal(parts.dense)
        largest = math.sqrt((2 if parts.kind == "hartley" else 1) / len(parts.dense))
        assert float(parts.dense.abs().max()) <= largest * (1 + 1e-14)
    assert kinds == {"sylvester", "paley", "hartley"}


@pytest.mark.parametrize("q", [3, 5, 9, 13, 27, 49, 81, 125, 343])
def test_quadratic_residues_of_a_field_satisfy_paleys_identities(q):
    """Oracle: Paley 1933. Q Q^T = q I - J, Q J = 0, and Q is symmetric for q = 1 mod 4, skew for q = 3 mod 4."""
    residues = torch.from_numpy(jacobsthal(q))
    ones = torch.ones(q, q, dtype=torch.float64)
    assert torch.equal(residues @ residues.T, q * torch.eye(q, dtype=torch.float64) - ones)
    assert torch.equal(residues @ ones, torch.zeros_like(ones))
    assert torch.equal(residues.T, residues if q % 4 == 1 else -residues)


@pytest.mark.parametrize("q", [15, 21, 45, 1])
def test_what_is_no_prime_power_has_no_field(q):
    assert jacobsthal(q) is None


def test_hartley_entries_are_cosine_plus_sine():
    found = hartley(7)
    for i in range(7):
        for j in range(7):
            angle = 2 * math.pi * i * j / 7
            assert math.isclose(found[i, j], (math.cos(angle) + math.sin(angle)) / math.sqrt(7), abs_tol=1e-15)


def test_sylvester_is_the_doubling_construction():
    doubled = torch.tensor([[1.0]], dtype=torch.float64)
    for _ in range(4):
        doubled = torch.cat((torch.cat((doubled, doubled), 1), torch.cat((doubled, -doubled), 1)))
    assert torch.equal(sylvester(16), doubled / 4)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("n", SIZES)
def test_kernel_is_the_explicit_matrix(n, transpose):
    """float64: sums of n terms near 1, against the Kronecker product; 1e-13 is hundreds of units in the last place."""
    x = torch.randn(3, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = torch.kron(factor(n).dense, sylvester(factor(n).power_of_two))
    expected = x @ (matrix if transpose else matrix.T)
    for module in (cpu, reference):
        torch.testing.assert_close(module.hadamard(x, n, transpose), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("rows", [1, 100])
@pytest.mark.parametrize("n", [4096, 704])
def test_float32_is_as_accurate_as_the_explicit_product(n, rows):
    """Both sides of MANY_BLOCKS, and a row longer than one piece of work."""
    x = torch.randn(rows, n, generator=torch.Generator().manual_seed(0))
    exact = x.double() @ reference.matrix(n).T
    plain = (x @ reference.matrix(n).float().T - exact).norm()
    assert (cpu.hadamard(x, n) - exact).norm() <= FLOAT32_ERRORS * plain


@pytest.mark.parametrize("n", [1, 2, 4, 8, 32, 512])
def test_every_power_of_two_is_covered(n):
    """The radix-4 passes leave one doubling over at odd powers, and the first pass nothing to do below four."""
    x = torch.randn(5, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(cpu.hadamard(x, n), x @ sylvester(n), rtol=0, atol=1e-13)


def test_blocks_are_transformed_on_their_own():
    x = torch.randn(2, 3, 384, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = cpu.hadamard(x, 128)
    assert found.shape == x.shape
    for block in range(3):
        part = slice(128 * block, 128 * (block + 1))
        torch.testing.assert_close(found[..., part], x[..., part] @ sylvester(128), rtol=0, atol=1e-13)


def test_the_transpose_undoes_it():
    x = torch.randn(4, 4864, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(cpu.hadamard(cpu.hadamard(x, 4864), 4864, transpose=True), x, rtol=0, atol=1e-13)


def test_the_input_is_left_as_it_was():
    for n in (64, 48):
        x = torch.randn(2, n)
        before = x.clone()
        cpu.hadamard(x, n)
        assert torch.equal(x, before)


def test_blocks_that_do_not_fit_are_refused():
    with pytest.raises(SpecError, match="blocks of 128"):
        cpu.hadamard(torch.zeros(2, 100), 128)


@pytest.mark.parametrize("block", [1, 2, 16, 12, 48, 176, 96])
@pytest.mark.parametrize("transpose", [False, True])
def test_by_factors_in_float64_is_the_definition(block, transpose):
    """Tolerance: sums of `block` float64 terms in another order."""
    x = torch.randn(3, 2 * block, dtype=torch.float64, generator=torch.Generator().manual_seed(block))
    found = factored.hadamard(x, block, transpose)
    torch.testing.assert_close(found, reference.hadamard(x, block, transpose), rtol=0, atol=1e-13)
