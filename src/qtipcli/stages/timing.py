"""Owns how products are timed: in turns, so that what else the machine does strikes all of them; from memory, not a cache."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

CALLS_IN_TURN = 4
"""Calls of one product before the next one's turn on a CPU; the first is not counted: the other's threads still spin."""

TURN_MICROSECONDS = 2000
"""About how long one replay of a graph takes: long against what starting it costs."""

MOST_CALLS_IN_GRAPH = 512

CACHE_MULTIPLE = 4
"""Copies of a matrix must fill the last cache this many times over for a reading to come from memory."""

Product = Callable[[], torch.Tensor]
Rotation = Sequence[Product]
"""The same product with one copy of its matrix after another."""


@dataclass(frozen=True)
class Timings:
    """microseconds: median of one call of each product. how: by what means; a fallback is named."""

    microseconds: tuple[float, ...]
    how: str


def copies_needed(matrix_bytes: int, cache_bytes: int) -> int:
    """Copies of a matrix to rotate over so that the last cache holds none of it when its turn comes; 1 without a cache."""
    return min(MOST_CALLS_IN_GRAPH, max(1, -(-CACHE_MULTIPLE * cache_bytes // matrix_bytes)))


def medians(rotations: Sequence[Rotation], seconds: float, device: torch.device) -> Timings:
    """Time each product for its share of `seconds`, and at least one turn."""
    if device.type != "cuda":
        return Timings(_cpu_medians([rotation[0] for rotation in rotations], seconds), "wall clock")
    turns = [_Turn(rotation) for rotation in rotations]
    reasons = sorted({turn.reason for turn in turns if turn.reason})
    times: list[list[float]] = [[] for _ in turns]
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or not times[-1]:
        for turn, spent in zip(turns, times, strict=True):
            spent.append(turn.microseconds())
    how = f"CUDA events, without graphs: {'; '.join(reasons)}" if reasons else "CUDA events around graph replays"
    return Timings(tuple(statistics.median(spent) for spent in times), how)


def _cpu_medians(products: Sequence[Product], seconds: float) -> tuple[float, ...]:
    times: list[list[float]] = [[] for _ in products]
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or not times[-1]:
        for product, spent in zip(products, times, strict=True):
            for call in range(CALLS_IN_TURN):
                started = time.perf_counter()
                product()
                if call:
                    spent.append((time.perf_counter() - started) * 1e6)
    return tuple(statistics.median(spent) for spent in times)


class _Turn:
    """As many calls of one product as make a turn, captured in a CUDA graph where that works.

    reason: why there is no graph, empty where there is one.
    """

    def __init__(self, rotation: Rotation) -> None:
        for product in rotation[:3]:
            product()  # compiles, and lets the libraries choose their kernels
        torch.cuda.synchronize()
        once = _event_microseconds(rotation[0])
        self.calls = max(1, min(MOST_CALLS_IN_GRAPH, round(TURN_MICROSECONDS / max(once, 1.0))))
        products = list(itertools.islice(itertools.cycle(rotation), self.calls))

        def run() -> None:
            for product in products:
                product()

        self._run, self.reason = captured(run)
        self._run()

    def microseconds(self) -> float:
        """Of one call, mean over this turn."""
        return _event_microseconds(self._run) / self.calls


def _event_microseconds(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def captured(run: Callable[[], None]) -> tuple[Callable[[], None], str]:
    """`run` as the replay of a CUDA graph, and an empty reason; or `run` itself and why it could not be captured.

    `run` must have been called before, so that nothing is compiled or allocated for the first time in the capture.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            run()
    except Exception as error:  # whatever a kernel or library raises here, the measurement has a slower way
        torch.cuda.synchronize()
        return run, f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
    return graph.replay, ""


def elapsed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, with all that it left to do on `device`."""
    wait_for(device)
    started = time.perf_counter()
    call()
    wait_for(device)
    return time.perf_counter() - started


def mean_elapsed(call: Callable[[], object], device: torch.device, seconds: float, most_calls: int = 64) -> float:
    """Mean seconds of one call, of as many as fit into `seconds`; at least one."""
    spent, calls = 0.0, 0
    while not calls or (calls < most_calls and spent * (calls + 1) / calls < seconds):
        spent += elapsed(call, device)
        calls += 1
    return spent / calls


def wait_for(device: torch.device) -> None:
    """Until `device` has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
