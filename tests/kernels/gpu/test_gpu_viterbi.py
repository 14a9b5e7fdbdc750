"""The GPU encoder: its walks tail-bite, cost what the reference's cost, and depend on nothing but the tile.

Oracle: `viterbi.reference`; at L = 16, on GPUs only, its CPU twin. In the interpreter, where a step takes 10 ms and more, rings
have 16 weights instead of 256.
"""

from collections.abc import Iterator

import compiled
import pytest
import torch
import viterbi_short_rings

from qtipcli_kernels import device as device_module
from qtipcli_kernels import spec as spec_module
from qtipcli_kernels.codes import tabulate
from qtipcli_kernels.spec import TrellisSpec
from qtipcli_kernels.viterbi import cpu, gpu, reference

ONE_CHUNK = [  # in L, kV, V; see gpu._advance for what tells the paths through a step apart
    TrellisSpec("1mad", 1, 8),
    TrellisSpec("3inst", 8, 8),  # no shared bits
    TrellisSpec("lut", 8, 8, weights_per_step=2),
]
MORE_CHUNKS = [
    TrellisSpec("mul1", 1, 9),
    TrellisSpec("1mad", 1, 10),  # two blocks of costs
    TrellisSpec("mcg", 5, 9),  # kV > L - kV
    TrellisSpec("lut", 3, 10),
    TrellisSpec("lut", 6, 11, weights_per_step=2),  # two words of choices
]
ALL_CHUNKS = [
    *(TrellisSpec(code, bits) for code, bits in (("1mad", 1), ("1mad", 2), ("mul1", 3), ("3inst", 4), ("mcg", 8))),
    *(TrellisSpec(code, bits_per_step) for code, bits_per_step in (("hyb", 2), ("hyb", 4), ("hyb2", 6), ("hyb", 8))),
]
SMALL = TrellisSpec("lut", 4, 8, weights_per_step=2)


INTERPRETED_RING = 16
"""Weights of a tile in the interpreter: at 1 bit still bits enough for a walk at L = 16 to come through any state."""


def shorten(monkeypatch: pytest.MonkeyPatch, ring: int) -> None:
    for module in (spec_module, reference):
        monkeypatch.setattr(module, "TILE_WEIGHTS", ring)


@pytest.fixture(autouse=True)
def ring(device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Weights of a tile; one torch thread, as the oracle is small."""
    if device == "cpu":
        shorten(monkeypatch, INTERPRETED_RING)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield spec_module.TILE_WEIGHTS
    torch.set_num_threads(before)


def spec_name(spec: TrellisSpec) -> str:
    return f"{spec.code}-kV{spec.bits_per_step}-V{spec.weights_per_step}-L{spec.state_bits}"


def gaussian_tiles(count: int, ring: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, ring, generator=torch.Generator().manual_seed(seed))


def encode(tiles: torch.Tensor, spec: TrellisSpec, table: torch.Tensor, device: str, fast: bool = False) -> torch.Tensor:
    """The walks, on the CPU; fails unless every one tail-bites."""
    states = gpu.encode(tiles.to(device), spec, table.to(device), fast).cpu()
    assert states.dtype == torch.int32 and states.shape == (len(tiles), spec.steps)
    assert ((states >= 0) & (states < spec.states)).all()
    shared = (1 << spec.shared_bits) - 1
    assert torch.equal(states >> spec.bits_per_step, states.roll(1, dims=1) & shared)
    return states


@pytest.mark.parametrize("fast", [False, True], ids=["exact", "fast"])
@pytest.mark.parametrize("spec", ONE_CHUNK + MORE_CHUNKS + ALL_CHUNKS, ids=spec_name)
def test_every_walk_costs_what_the_references_costs(spec: TrellisSpec, fast: bool, device: str, ring: int) -> None:
    if device == "cpu" and (spec in ALL_CHUNKS or (fast and spec in MORE_CHUNKS)):
        pytest.skip("takes the interpreter seconds")
    table = tabulate(spec)
    tiles = gaussian_tiles(300 if device == "cuda" else 1, ring)
    states = encode(tiles, spec, table, device, fast)[:2]
    tiles = tiles[:2]
    oracle = cpu if spec in ALL_CHUNKS else reference  # the reference takes minutes there
    expected = reference.distortion(tiles, oracle.encode(tiles, spec, table, fast), table)
    # A cost's last kV bits of 23 are not its own. Measured: 256 such roundings change a walk's cost by up to 6 times the size
    # of one at 8 bits a step, and by nothing at 2 to 4.
    torch.testing.assert_close(
        reference.distortion(tiles, states, table), expected, rtol=2.0 ** (spec.bits_per_step - 20), atol=0
    )


def test_a_walk_that_exists_is_found(device: str, ring: int) -> None:
    """mul1's values are no float16, but integers in the unit that the kernel takes."""
    spec = TrellisSpec("mul1", 2, 8)
    bits = torch.randint(0, 4, (1, spec.steps), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    states = sum(bits.roll(step, dims=1) << 2 * step for step in range(4))
    table = tabulate(spec)
    tiles = table[states.long()].reshape(1, ring)
    found = encode(tiles, spec, table, device)
    assert reference.distortion(tiles, found, table).tolist() == [0.0]


def test_a_tile_has_the_same_walk_alone_and_in_any_batch(device: str, ring: int) -> None:
    """5 tiles: of the interpreter's 2 programs one takes three, the other two."""
    table = tabulate(SMALL)
    tiles = gaussian_tiles(5 if device == "cpu" else 2000, ring)
    together = encode(tiles, SMALL, table, device)
    for index in (0, len(tiles) - 1):
        assert torch.equal(encode(tiles[index : index + 1], SMALL, table, device)[0], together[index])
    assert encode(tiles[:0], SMALL, table, device).shape == (0, SMALL.steps)


def test_no_tile_is_too_strange_and_none_disturbs_another(device: str, ring: int) -> None:
    spec = TrellisSpec("3inst", 2, 8)
    table = tabulate(spec)
    tiles = gaussian_tiles(5, ring)
    tiles[0, 1] = 0.0
    expected = reference.encode(tiles, spec, table)
    tiles[0, 1] = torch.nan
    tiles[1, ::2] = torch.inf
    tiles[2] *= 1e4
    tiles[3] = 0.0
    states = encode(tiles, spec, table, device)
    assert torch.equal(states[[0, 4]], expected[[0, 4]])
    expected = reference.encode(tiles[2:4], spec, table)
    costs, lowest = (reference.distortion(tiles[2:4], walks, table) for walks in (states[2:4], expected))
    # Of a tile of 10,000s the reference's own float32 costs keep no more of what tells walks apart.
    torch.testing.assert_close(costs, lowest, rtol=1e-5, atol=0)


def test_the_unit_of_weights_and_table_changes_nothing(device: str, ring: int) -> None:
    """Beyond float16 both ways."""
    table = tabulate(SMALL)
    tiles = gaussian_tiles(1, ring)
    for unit in (2.0**-40, 2.0**40):
        assert torch.equal(encode(tiles * unit, SMALL, table * unit, device), encode(tiles, SMALL, table, device))


@pytest.mark.parametrize("code", ["1mad", "mul1", "3inst", "mcg", "lut"])
def test_float16_holds_every_default_table_in_the_kernels_unit(code: str, device: str, ring: int) -> None:
    """Up to the rounding of the float32 table that 1MAD's and mul1's integers were made into."""
    spec = TrellisSpec(code, 2)
    table = tabulate(spec).to(device)
    _, code_VS = gpu._scaled(gaussian_tiles(1, ring).to(device), spec, table)
    largest = table.abs().argmax()
    unit = table.flatten()[largest].double() / code_VS.T.flatten()[largest].double()
    torch.testing.assert_close(code_VS.T.double() * unit, table.double(), rtol=2.0**-22, atol=0)


class Launches:
    """Stands for the kernel: keeps the size of the scratch memory that each launch brings."""

    def __init__(self) -> None:
        self.choices: list[int] = []

    def __getitem__(self, grid: tuple[int]):
        return lambda x, code, choices, states, count, **options: self.choices.append(choices.nbytes)


@pytest.mark.parametrize("spec", [TrellisSpec("1mad", 1), TrellisSpec("1mad", 2), TrellisSpec("mcg", 8), SMALL], ids=spec_name)
def test_scratch_memory_does_not_grow_with_the_number_of_tiles(
    spec: TrellisSpec, device: str, ring: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = Launches()
    monkeypatch.setattr(gpu, "_encode_kernel", launches)
    table = tabulate(spec).to(device)
    for count in (10_000, 11_000):
        gpu.encode(torch.zeros(count, ring, device=device), spec, table)
    processors = 1 if device == "cpu" else torch.cuda.get_device_properties(0).multi_processor_count
    assert launches.choices[0] == launches.choices[1] <= processors * (2 << 20) + 8


def test_a_cpu_tensor_is_refused(monkeypatch: pytest.MonkeyPatch, ring: int) -> None:
    monkeypatch.setattr(device_module, "INTERPRETED", False)
    with pytest.raises(device_module.DeviceError, match="cpu"):
        gpu.encode(gaussian_tiles(1, ring), SMALL, tabulate(SMALL))


@pytest.mark.parametrize("name", viterbi_short_rings.SPECS)
def test_compiled_for_hopper_it_finds_the_references_walks(
    name: str, device: str, monkeypatch: pytest.MonkeyPatch, ring: int
) -> None:
    """In the PTX emulator; the costs cross shared memory without a bank conflict."""
    if device == "cuda":
        pytest.skip("the GPU itself runs it")
    kernel = compiled.kernels("viterbi_short_rings", ("sm_90",))[name, "sm_90"]
    shorten(monkeypatch, viterbi_short_rings.RING)
    spec = viterbi_short_rings.SPECS[name]
    table = tabulate(spec)
    tiles = gaussian_tiles(1, viterbi_short_rings.RING)
    x, code_VS = gpu._scaled(tiles, spec, table)
    choices = torch.full((spec.steps * gpu._words_per_step(spec) + 1,), -1, dtype=gpu._word_type(spec))
    states = torch.full((1, spec.steps), -1, dtype=torch.int32)
    report = kernel.launch((1,), x, code_VS, choices, states, 1, profile=True)
    assert torch.equal(states, reference.encode(tiles, spec, table))
    assert report.traffic.shared_wavefronts == report.traffic.shared_wavefronts_least
