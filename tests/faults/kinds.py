"""Owns the list of what is done to a job, by name."""

from __future__ import annotations

from collections.abc import Callable

from faults import damage, disks, numbers, others, power, stops
from faults.judge import Fault, Verdict

KINDS: dict[str, Callable[[Fault], Verdict]] = {
    "kill -9": stops.killed,
    "SIGTERM": stops.terminated,
    "Ctrl-C": stops.interrupted,
    "full disk": disks.full,
    "read-only directory": disks.read_only,
    "shard cut short": damage.truncated,
    "bit in a shard": damage.shard_bit,
    "bit in the ledger": damage.ledger_bit,
    "bit in the packed model": damage.packed_bit,
    "two processes": others.two_at_once,
    "clock moved": others.clock_back,
    "power cut": power.power_cut,
    "NaN in weights": numbers.bad_weights,
    "overflowing activations": numbers.bad_activations,
    "bad Hessians": numbers.bad_hessians,
    "expert without tokens": numbers.idle_expert,
}

SUBJECTS: dict[str, list[str]] = {
    "bit in the packed model": ["pack", "finetune", "pipeline"],
    "bad Hessians": ["calibrate", "quantize", "pipeline"],
    "expert without tokens": ["calibrate", "pipeline"],
}
"""Kind -> the subjects that it can be done to, where not to all."""

ELSEWHERE = ("out of memory in a layer (tests/quant)",)
"""Faults of the issue that have a test of their own instead of a kind here."""
