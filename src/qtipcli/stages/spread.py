"""Owns which of several processes does which piece of work, by what it is predicted to cost, and how results come back."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, MutableSequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from safetensors.torch import load, save
from torch import Tensor

from qtipcli.job.processes import Processes, Sent

Piece = TypeVar("Piece", bound=Hashable)

FACTOR_OPERATIONS = 10
"""Floating-point operations of what is done once for a group of I inputs, over I^3: turning and factoring its Hessian."""

EDGE_OPERATIONS = 12
"""The same of the encoder for each weight and state of the trellis: two passes of some six each."""


def rounding_cost(weights: int, inputs: int, state_bits: int, weights_per_step: int) -> float:
    """Predicted operations of rounding a group of layers with `weights` weights in all and one input of `inputs` features."""
    return EDGE_OPERATIONS * weights * 2.0**state_bits / weights_per_step + FACTOR_OPERATIONS * float(inputs) ** 3


def least_loaded(costs: Mapping[Piece, float], loads: MutableSequence[float]) -> dict[Piece, int]:
    """Piece -> process: the dearest first, each to the process with the least so far; of equal ones the first.

    loads: what each process has already; what is given out is added.
    """
    owners: dict[Piece, int] = {}
    for piece in sorted(costs, key=lambda each: -costs[each]):  # stable: equal costs stay in their order
        owners[piece] = min(range(len(loads)), key=loads.__getitem__)
        loads[owners[piece]] += costs[piece]
    return {piece: owners[piece] for piece in costs}


@dataclass(frozen=True)
class Parcel:
    """A result that one process has and others need: tensors on the CPU, and a report of JSON values."""

    tensors: dict[str, Tensor]
    report: dict[str, Any]

    def packed(self) -> Tensor:
        """As uint8 [bytes]."""
        data = save({name: tensor.contiguous() for name, tensor in self.tensors.items()}, {"report": json.dumps(self.report)})
        return torch.frombuffer(bytearray(data), dtype=torch.uint8)

    @classmethod
    def unpacked(cls, packed: Tensor) -> Parcel:
        """From `packed`."""
        data = packed.numpy().tobytes()
        length = int.from_bytes(data[:8], "little")
        return cls(load(data), json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["report"]))


def send(processes: Processes, parcel: Parcel, to: int) -> list[Sent]:
    """Start to send; the other process calls `receive`."""
    packed = parcel.packed()
    return [processes.send(each, to) for each in (torch.tensor([len(packed)]), packed)]


def receive(processes: Processes, source: int) -> Parcel:
    """The next parcel that `source` sends."""
    size = torch.empty(1, dtype=torch.int64)
    processes.receive(size, source)
    packed = torch.empty(int(size), dtype=torch.uint8)
    processes.receive(packed, source)
    return Parcel.unpacked(packed)


def exchange(processes: Processes, parcel: Parcel | None, owner: int) -> Parcel:
    """The parcel of `owner` in every process; collective."""
    packed = parcel.packed() if parcel is not None else torch.empty(0, dtype=torch.uint8)
    size = torch.tensor([len(packed)])
    processes.broadcast_(size, owner)
    if parcel is None:
        packed = torch.empty(int(size), dtype=torch.uint8)
    processes.broadcast_(packed, owner)
    return parcel or Parcel.unpacked(packed)
