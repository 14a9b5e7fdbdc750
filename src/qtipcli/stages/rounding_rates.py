"""Owns the measurement of what rounding takes: the encoder's speed, and what stands around it in time and in memory.

The rounding itself is run on matrices of no meaning. All that it holds grows with the square of a matrix's side, so its memory
is counted on a smaller matrix of the same proportions; its time is that of the encoder, of steps that follow one another, and
of products that grow with the cube.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from qtipcli.config import QuantizeSettings
from qtipcli.quant.correction import Evidence, corrected
from qtipcli.quant.matrix import RoundingSettings, round_group
from qtipcli.quant.output_side import OutputHessian, choose_damping
from qtipcli.quant.scale import SEARCH_FACTORS, SEARCH_ROWS, SEARCH_STATE_BITS
from qtipcli.quant.transform import Transform, padded
from qtipcli.stages.live_bytes import LiveBytes
from qtipcli.stages.timing import elapsed, wait_for
from qtipcli_kernels.codes import default_lut, tabulate
from qtipcli_kernels.dispatch import encode
from qtipcli_kernels.spec import TILE, TILE_WEIGHTS, TrellisSpec

LARGEST_COUNTED = 1024
"""Largest side of the matrices that memory is counted on."""

ENCODER_SECONDS = 0.4
"""Spent on the encoder for each trellis."""

SEARCHED_TILES = len(SEARCH_FACTORS) * SEARCH_ROWS // TILE
"""Tiles that the search hands to the encoder at once."""

SIDES = (64, 256, 768)
"""Of the square matrices that the rest of the rounding is timed on."""


@dataclass(frozen=True, slots=True)
class Group:
    """Linears that share an input. outputs: features of each; inputs: their common ones."""

    outputs: tuple[int, ...]
    inputs: int

    def shrunk(self) -> tuple[Group, float]:
        """(a group of the same proportions that memory is counted on, how often its memory the whole one takes)."""
        scale = max(1, -(-max(*self.outputs, self.inputs) // LARGEST_COUNTED))
        if scale == 1:
            return self, 1.0
        small = Group(tuple(padded(-(-outputs // scale)) for outputs in self.outputs), padded(-(-self.inputs // scale)))
        return small, self._area() / small._area()

    def _area(self) -> int:
        return self.inputs**2 + sum(outputs**2 + outputs * self.inputs for outputs in self.outputs)

    @property
    def weights(self) -> int:
        """Padded to whole tiles."""
        return padded(self.inputs) * sum(map(padded, self.outputs))

    @property
    def steps(self) -> int:
        """Tiles that follow one another, at the most: those of a matrix's longer way from corner to corner."""
        return sum(padded(outputs) + padded(self.inputs) for outputs in self.outputs) // TILE

    @property
    def cubes(self) -> float:
        """What the products, factorizations and the feedback of a two-sided rounding grow with."""
        total = float(self.inputs**3)
        for outputs in self.outputs:
            total += outputs**3 + outputs * self.inputs * (outputs + self.inputs)
        return total

    @property
    def searched(self) -> int:
        """Weights that the search for the best scales rounds."""
        rows = sum(min(SEARCH_ROWS, padded(outputs)) for outputs in self.outputs)
        return len(SEARCH_FACTORS) * rows * padded(self.inputs)


@dataclass(frozen=True, slots=True)
class RoundingRates:
    """Seconds of a layer, of each step, of each unit of `Group.cubes`, and of each weight that the search rounds."""

    layer: float
    step: float
    cube: float
    searched: float

    def seconds(self, group: Group, encoder: float) -> float:
        """Of one group. encoder: weights a second."""
        around = self.layer * len(group.outputs) + self.step * group.steps + self.cube * group.cubes
        return group.weights / encoder + around + self.searched * group.searched


def encoder_rate(spec: TrellisSpec, fast: bool, device: torch.device, tiles: int = 32) -> float:
    """Weights a second that become walks, `tiles` tiles at a time."""
    draws = torch.randn(tiles, TILE_WEIGHTS, generator=torch.Generator().manual_seed(0)).to(device)
    table = tabulate(spec, default_lut(spec)).to(device)
    encode(draws, spec, table, fast)  # compiles it, if nobody has
    wait_for(device)
    started = time.perf_counter()
    done = 0
    while not done or time.perf_counter() - started < ENCODER_SECONDS:
        encode(draws, spec, table, fast)
        done += 1
        wait_for(device)
    return done * draws.numel() / (time.perf_counter() - started)


def rounding_rates(settings: QuantizeSettings, device: torch.device) -> RoundingRates:
    """Measured on square matrices of SIDES, with the search's small trellis; the encoder's share is taken off."""
    spec = settings.spec()
    bits = max(spec.bits_per_step, min(spec.state_bits, SEARCH_STATE_BITS))
    small = TrellisSpec(spec.code, spec.bits_per_step, bits, spec.weights_per_step)  # the search's, which is compiled anyway
    encoder = encoder_rate(small, settings.fast, device)
    rows, times = [], []
    for side in SIDES:
        group = Group((side,), side)
        if not times:
            _round(group, settings, small, device, search=False)
        seconds = elapsed(lambda group=group: _round(group, settings, small, device, search=False), device)
        rows.append([1.0, float(group.steps), group.cubes])
        times.append(max(0.0, seconds - group.weights / encoder))
    is_searched = settings.search and settings.scale is None
    searched = 1.0 / encoder_rate(small, False, device, SEARCHED_TILES) if is_searched else 0.0
    return RoundingRates(*_positive_fit(rows, times), searched)


def rounding_bytes(group: Group, settings: QuantizeSettings, spec: TrellisSpec, device: torch.device) -> int:
    """Most bytes alive while a group is corrected and rounded: what is known of its input and outputs included, not the
    weights themselves."""
    small, factor = group.shrunk()
    tiny = TrellisSpec(spec.code, spec.bits_per_step, max(spec.bits_per_step, min(spec.state_bits, 8)), spec.weights_per_step)
    search = settings.search and settings.scale is None and factor == 1.0
    weights = _weights(small, device)
    with LiveBytes() as live:
        _round_weights(weights, settings, tiny, search)
    return int(live.peak * factor)


def output_side_bytes(outputs: int, device: torch.device) -> int:
    """Most bytes alive while the damping of an output side is chosen, the two Hessians included."""
    small, factor = Group((outputs,), outputs).shrunk()
    with LiveBytes() as live:
        choose_damping(_hessian(small.inputs, device), _hessian(small.inputs, device))
    return int(live.peak * factor)


def output_side_seconds(outputs: int, device: torch.device) -> float:
    """Seconds to choose the damping of an output side; by the cube where it is large."""
    side = min(outputs, SIDES[-1])
    choose_damping(_hessian(side, device), _hessian(side, device))
    seconds = elapsed(lambda: choose_damping(_hessian(side, device), _hessian(side, device)), device)
    return seconds * (outputs / side) ** 3


def _round(group: Group, settings: QuantizeSettings, spec: TrellisSpec, device: torch.device, search: bool) -> None:
    """As the quantize stage rounds a group of a block."""
    _round_weights(_weights(group, device), settings, spec, search)


def _weights(group: Group, device: torch.device) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {
        str(number): torch.randn(outputs, group.inputs, generator=draw).to(device)
        for number, outputs in enumerate(group.outputs)
    }


def _round_weights(weights: dict[str, torch.Tensor], settings: QuantizeSettings, spec: TrellisSpec, search: bool) -> None:
    """As `_round`; the original weights are a part of the block, and not let go of."""
    one = next(iter(weights.values()))
    hessian_II = _hessian(one.shape[1], one.device)
    rounding = RoundingSettings(
        Transform.parse(settings.transform), settings.damping, settings.refit, settings.scale, search, settings.fast
    )
    given = dict(weights)
    if settings.quantized_prefix:
        heldout_II = hessian_II / 8
        evidence = {
            name: (Evidence(hessian_II, weight.clone(), 8), Evidence(heldout_II, weight / 8, 1))
            for name, weight in weights.items()
        }
        given = {name: corrected(weight, *evidence[name])[0] for name, weight in weights.items()}
        del evidence, heldout_II
    outputs = _Outputs(weights) if settings.two_sided else None
    table = default_lut(spec)
    round_group(
        given, hessian_II, dict.fromkeys(weights, spec), rounding, dict.fromkeys(weights, table), outputs, consume=True
    )  # fmt: skip


class _Outputs(Mapping[str, OutputHessian]):
    """Made anew each time, as the stage reads them."""

    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        self._weights = weights

    def __getitem__(self, name: str) -> OutputHessian:
        return OutputHessian(_hessian(len(self._weights[name]), self._weights[name].device), 1e-2)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def _hessian(size: int, device: torch.device) -> torch.Tensor:
    return torch.eye(size, device=device).add_(0.1)


def _positive_fit(rows: list[list[float]], times: list[float]) -> tuple[float, float, float]:
    """Three coefficients that give three times; what would be negative, since clocks err, is nothing, and the rest fits better.

    Each part is read where it counts most: the cube at the largest side, then the steps, then what a layer takes anyway.
    """
    cube = max(0.0, times[2] - times[1]) / (rows[2][2] - rows[1][2])
    step = max(0.0, (times[1] - times[0]) - cube * (rows[1][2] - rows[0][2])) / (rows[1][1] - rows[0][1])
    layer = max(0.0, times[0] - step * rows[0][1] - cube * rows[0][2])
    return layer, step, cube
