"""Owns --max-memory: what a job may hold in memory so that it stays below a limit, or why it cannot, before it starts.

Only what changes no bit of the result is chosen: how many activations wait in memory rather than in a file, and with that how
many experts' sums are taken in one pass. What else a job takes follows from the model and from its settings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from qtipcli.errors import SettingsError
from qtipcli.stages.room import free_bytes
from qtipcli.stages.streams import DEFAULT_MEMORY_GIB

CHOICES = (DEFAULT_MEMORY_GIB, 2.0, 1.0, 0.5, 0.25, 0.125, 0.0)
"""GiB of activations in memory that are tried, the fastest first."""

REMEDIES = {
    "output side": "--one-sided needs no pass back",
    "quantize, rounding": "--one-sided rounds in less, if it was not given; --skip leaves the largest layers as they are",
    "quantize, what a group": "--original-prefix needs no sums beside the Hessians; fewer --samples are no help",
    "quantize, on": "--original-prefix takes one stream instead of two",
    "calibrate, inputs": "a shorter --context takes less on its way through a block",
    "pack": "qtip pack --max-shard-size makes smaller files",
}
"""How a phase begins -> what helps; each makes another job."""


@dataclass(frozen=True, slots=True)
class Fit:
    """What was chosen, and what it leads to. memory_gib: of activations in memory. peak: bytes of the process, in `phase`."""

    memory_gib: float
    peak: int
    phase: str


def fit(phases: Callable[[float], Mapping[str, Mapping[str, int]]], limit: int, device: torch.device) -> Fit:
    """The first of CHOICES with which the job stays below `limit` bytes.

    phases: GiB of activations in memory -> {"ram": {phase: bytes}, "vram": the same of a GPU}. Raises SettingsError, naming
    what takes the most and what helps, where none does, or where the GPU has not what the job takes there.
    """
    for memory_gib in CHOICES:
        found = phases(memory_gib)
        phase = max(found["ram"], key=found["ram"].__getitem__)
        if found["ram"][phase] <= limit:
            _check_gpu(found["vram"], device)
            return Fit(memory_gib, found["ram"][phase], phase)
    raise _too_little(f"--max-memory {limit / 1e6:,.0f} MB is", found["ram"], phase)


def _check_gpu(vram: Mapping[str, int], device: torch.device) -> None:
    if not vram:
        return
    phase, free = max(vram, key=vram.__getitem__), free_bytes(device)
    if vram[phase] > free:
        raise _too_little(f"{free / 1e6:,.0f} MB free on {device} are", vram, phase)


def _too_little(fact: str, sizes: Mapping[str, int], phase: str) -> SettingsError:
    helps = next((text for start, text in REMEDIES.items() if phase.startswith(start)), "")
    needed = f"{sizes[phase] / 1e6:,.0f} MB"
    return SettingsError(
        f"{fact} too little: this job takes about {needed}, in the phase '{phase}'",
        f"give {needed} or more{f'; {helps}' if helps else ''}",
    )


def default_memory_gib() -> float:
    """Where no limit is given: the usual one, but no more than a quarter of what is free on this machine."""
    return min(DEFAULT_MEMORY_GIB, free_bytes(torch.device("cpu")) / 2**30 / 4)
