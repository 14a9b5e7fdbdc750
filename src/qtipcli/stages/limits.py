"""Owns what bounds a product on a device: its measured copy bandwidth, its instruction rate, the size of its last cache."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

COPY_BYTES = {"cuda": 2 << 30, "cpu": 256 << 20}
"""Bytes of the buffer copied: thirty times the last cache of an H200, and eight times that of eight server cores."""

COPY_ROUNDS = 10

LANE_OPERATIONS_PER_S = {"H200": 33e12, "RTX 4090": 41e12, "RTX 6000 Ada": 45e12}
"""32-bit lane operations that a GPU can issue each second, by a part of its name (the design notes: four schedulers of 32
lanes in each multiprocessor at its boost clock)."""

OPERATIONS_PER_WEIGHT = {"hyb": 4.0, "hyb2": 4.1, "1mad": 7.6, "mul1": 7.6, "3inst": 7.3, "mcg": 7.3}
"""Lane operations of the fused product for each weight, batch 1, 2 bits, counted in the machine code for sm_90; multiplies
and byte sums count twice (docs/benchmarks/kernels.md). `lut` is bound by its look-ups, not by operations, and has no figure."""


def copy_bandwidth(device: torch.device) -> dict[str, Any]:
    """Measure how fast memory is copied: {"GB_per_s", "MB", "how"}; bytes read and bytes written both counted, median."""
    size = COPY_BYTES["cuda" if device.type == "cuda" else "cpu"]
    if device.type == "cuda":
        size = min(size, torch.cuda.mem_get_info(device)[0] // 8)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for round_ in range(COPY_ROUNDS + 2):
        spent = _seconds(lambda: target.copy_(source), device)
        if round_ > 1:  # the first two touch the pages and wake the clocks
            seconds.append(spent)
    return {
        "GB_per_s": 2 * size / statistics.median(seconds) / 1e9,
        "MB": size / 1e6,
        "how": f"median of {COPY_ROUNDS} copies of {size / 1e6:.0f} MB by torch, bytes read and bytes written both counted",
    }


def _seconds(call: Any, device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        call()
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def lane_operations(device: torch.device) -> float | None:
    """32-bit lane operations a second of a GPU that the table above knows; None for any other device."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for part, rate in LANE_OPERATIONS_PER_S.items() if part in name), None)


def weights_limit(code: str, rate: float | None) -> float | None:
    """Weights a second that `code` cannot exceed on a device of `rate` lane operations a second, or None where not known."""
    operations = OPERATIONS_PER_WEIGHT.get(code)
    return rate / operations if rate and operations else None


def last_cache_bytes(device: torch.device) -> int:
    """Bytes of the last cache before memory; 0 where it is not asked for (a CPU's shared caches)."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
