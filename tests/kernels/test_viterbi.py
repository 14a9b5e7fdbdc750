"""The encoder: its walks tail-bite, cost what the textbook's cost, and depend on nothing but the tile.

Oracles: `viterbi.reference`, an exhaustive dynamic programme in float64 written here, and the table of method.md, section 3.
"""

import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from qtipcli_kernels import threads
from qtipcli_kernels.codes import default_lut, tabulate
from qtipcli_kernels.packing import pack, unpack
from qtipcli_kernels.spec import TrellisSpec
from qtipcli_kernels.viterbi import cpu, reference

SPECS = [
    TrellisSpec("1mad", 1, 8),
    TrellisSpec("mul1", 4, 8),
    TrellisSpec("mcg", 5, 9),
    TrellisSpec("3inst", 8, 8),
    TrellisSpec("3inst", 8, 10),
    TrellisSpec("3inst", 2, 14),
    TrellisSpec("hyb", 2, 8),
    TrellisSpec("hyb", 3, 9),
    TrellisSpec("hyb2", 8, 8),
    TrellisSpec("lut", 1, 8),
    TrellisSpec("lut", 8, 9, weights_per_step=2),
    TrellisSpec("lut", 4, 12, weights_per_step=2),
]
SMALL = TrellisSpec("3inst", 2, 10)

TABLE_2_BITS = {"1mad": 0.0687, "3inst": 0.0685, "hyb": 0.0703}
"""method.md, section 3: mean squared error of a Gaussian source at 2 bits, L = 16, where the best scale is 1."""


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    """The oracles are small products: on a busy machine torch's threads would wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def spec_name(spec: TrellisSpec) -> str:
    return f"{spec.code}-kV{spec.bits_per_step}-V{spec.weights_per_step}-L{spec.state_bits}"


def table_of(spec: TrellisSpec) -> torch.Tensor:
    """The code where it is computed, otherwise random values: the encoder takes any table."""
    if spec.code in ("hyb", "hyb2", "lut"):
        return torch.randn(spec.states, spec.weights_per_step, generator=torch.Generator().manual_seed(5))
    return tabulate(spec)


def gaussian_tiles(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 256, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("fast", [False, True], ids=["exact", "fast"])
@pytest.mark.parametrize("spec", SPECS, ids=spec_name)
def test_every_walk_costs_what_the_references_costs(spec: TrellisSpec, fast: bool) -> None:
    table = table_of(spec)
    tiles = gaussian_tiles(1 if spec.state_bits == 14 else 3)
    expected = reference.distortion(tiles, reference.encode(tiles, spec, table, fast), table)
    states = cpu.encode(tiles, spec, table, fast)
    pack(states, spec)  # raises unless every walk is tail-biting
    torch.testing.assert_close(reference.distortion(tiles, states, table), expected, rtol=1e-6, atol=0)


def cheapest_from(tile: np.ndarray, spec: TrellisSpec, table: np.ndarray, seam: int) -> float:
    """Cost in float64 of the best walk whose ends share the bits `seam`: the costs of all states, step by step."""
    x_TV = tile.reshape(spec.steps, spec.weights_per_step).astype(np.float64)
    follows = [
        [previous for previous in range(spec.states) if previous % (1 << spec.shared_bits) == state >> spec.bits_per_step]
        for state in range(spec.states)
    ]
    cost = np.array([0.0 if state >> spec.bits_per_step == seam else np.inf for state in range(spec.states)])
    cost += np.square(x_TV[0] - table).sum(-1)
    for x in x_TV[1:]:
        cost = cost[np.array(follows)].min(-1) + np.square(x - table).sum(-1)
    return min(cost[state] for state in range(spec.states) if state % (1 << spec.shared_bits) == seam)


def test_the_walk_is_the_best_of_all_with_its_ends_and_nearly_the_best_of_all() -> None:
    spec = TrellisSpec("1mad", 5, 8)
    table = tabulate(spec)
    tiles = gaussian_tiles(3, seed=1)
    states = cpu.encode(tiles, spec, table)
    costs = reference.distortion(tiles, states, table).numpy()
    for tile, walk, cost in zip(tiles.numpy(), states.tolist(), costs, strict=True):
        by_seam = [cheapest_from(tile, spec, table.double().numpy(), seam) for seam in range(1 << spec.shared_bits)]
        assert cost == pytest.approx(by_seam[walk[0] >> spec.bits_per_step], rel=1e-6)
        assert cost <= 1.01 * min(by_seam)


def test_without_shared_bits_each_step_takes_the_nearest_value() -> None:
    spec = TrellisSpec("3inst", 8, 8)
    table = tabulate(spec)
    tiles = gaussian_tiles(5)
    nearest = (tiles[..., None] - table[:, 0]).abs().min(-1).values
    expected = nearest.double().square().sum(-1)
    torch.testing.assert_close(reference.distortion(tiles, cpu.encode(tiles, spec, table), table), expected, rtol=1e-6, atol=0)


def test_a_walk_that_exists_is_found() -> None:
    words = torch.randint(-(2**31), 2**31 - 1, (4, SMALL.words_per_tile), generator=torch.Generator().manual_seed(0))
    states = unpack(words.to(torch.int32), SMALL)
    table = tabulate(SMALL)
    tiles = table[states.long()].reshape(4, 256)
    assert reference.distortion(tiles, cpu.encode(tiles, SMALL, table), table).tolist() == [0.0] * 4


def test_a_tile_has_the_same_walk_alone_and_in_any_batch() -> None:
    table = tabulate(SMALL)
    tiles = gaussian_tiles(7)
    together = cpu.encode(tiles, SMALL, table)
    for index in range(7):
        assert torch.equal(cpu.encode(tiles[index : index + 1], SMALL, table)[0], together[index])
    assert torch.equal(cpu.encode(tiles.flip(0), SMALL, table).flip(0), together)
    assert cpu.encode(tiles[:0], SMALL, table).shape == (0, 256)


@pytest.mark.parametrize("count", [1, 3, 8])
def test_the_number_of_threads_changes_nothing(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tabulate(SMALL)
    tiles = gaussian_tiles(33)
    expected = cpu.encode(tiles, SMALL, table)
    threads._pool.cache_clear()
    monkeypatch.setattr(threads, "thread_count", lambda: count)
    try:
        assert torch.equal(cpu.encode(tiles, SMALL, table), expected)
    finally:
        threads._pool.cache_clear()


def test_asking_for_the_threads_does_not_start_numbas_own() -> None:
    threads.thread_count()
    assert torch.get_num_threads() == 1  # Numba's OpenMP layer would set it to the number of cores


def peak_beyond_result(tiles: torch.Tensor) -> int:
    """Bytes that an encode held at most, beyond its result, as seen by NumPy's allocator."""
    table = tabulate(SMALL)
    tracemalloc.start()
    try:
        states = cpu.encode(tiles, SMALL, table)
        return tracemalloc.get_traced_memory()[1] - states.numel() * states.element_size()
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_number_of_tiles() -> None:
    cpu.encode(gaussian_tiles(40), SMALL, tabulate(SMALL))  # compiled, and each thread has its scratch
    few, many = peak_beyond_result(gaussian_tiles(16)), peak_beyond_result(gaussian_tiles(512))
    # Scratch for each tile would be 64 KiB of back-pointers; what is allowed is Python's own bookkeeping.
    assert many - few < 512 * 1024


@pytest.mark.parametrize("code", TABLE_2_BITS)
def test_distortion_at_two_bits_is_the_papers(code: str) -> None:
    spec = TrellisSpec.at_bits(code, 2)
    table = tabulate(spec, default_lut(spec))
    code_rms = table.double().square().mean().sqrt().float()
    tiles = gaussian_tiles(64, seed=3)
    states = cpu.encode(tiles * code_rms, spec, table)
    errors = reference.distortion(tiles * code_rms, states, table).numpy() / code_rms.double().item() ** 2
    # Relative to the energy that was drawn, which takes out most of the variance: over 64 tiles the standard error is then
    # about 0.6 %, and the table's own is as large. 3 % is more than three of both together.
    energies = tiles.double().square().sum(-1).numpy()
    ratio = errors.sum() / energies.sum()
    assert np.std(errors - ratio * energies) / 8 / errors.mean() < 0.008
    assert ratio == pytest.approx(TABLE_2_BITS[code], rel=0.03)
