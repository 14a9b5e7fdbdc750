"""Owns the reading of layers' output Hessians from a calibrate job: one at a time, when it is asked for, and none is kept."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch

from qtipcli.job.directory import RunDirectory
from qtipcli.quant.output_side import OutputHessian


class StoredOutputs(Mapping[str, OutputHessian]):
    """Full name -> the Hessian of that layer's outputs, read anew each time.

    key: the shard that holds them, which is checked. names: of the layers, which it has.
    """

    def __init__(self, calibration: RunDirectory, key: str, names: Sequence[str], device: torch.device) -> None:
        self._calibration, self._key, self._names, self._device = calibration, key, tuple(names), device
        self._layers = calibration.report(key)["layers"]

    def __getitem__(self, name: str) -> OutputHessian:
        damping = self._layers[name]["damping"]
        with self._calibration.open_shard(self._key) as shard:
            hessian_OO = shard.get_tensor(name).to(self._device)
        return OutputHessian(hessian_OO, math.inf if damping is None else damping)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
