"""Owns the descent: Adam on the masters, the course of the learning rate, the order of the batches, and the best state so far.

Everything that decides the next step can be saved and put back, so that an interrupted descent ends in the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from qtipcli.errors import QtipError
from qtipcli.tune.parameters import Trained

BETAS = (0.9, 0.95)
"""Adam's. The second is lower than the usual .999: runs are some hundred steps long."""

WARM_UP_STEPS = 10

ADAM_PARTS = ("step", "exp_avg", "exp_avg_sq")
"""What Adam keeps of each parameter."""


class Descent:
    """Adam over `trained` for `steps` steps, with a linear warm-up and a cosine to nothing.

    steps: of the whole descent. reduce: called with the masters after gradients are complete and before they are used; where
    several processes share a descent, it sums the gradients over them. One process needs none.

    Attributes:
        step: steps taken. best: the stored state (Trained.stored) with the lowest held-out loss. best_loss: that loss.
    """

    def __init__(self, trained: Trained, steps: int, reduce: Callable[[Iterable[nn.Parameter]], None] | None = None) -> None:
        self.trained, self.steps, self.step = trained, steps, 0
        self.best = trained.stored()
        self.best_loss = math.inf
        self._reduce = reduce
        groups = [{"params": [master], "lr": trained.rates[name]} for name, master in trained.masters.items()]
        self._adam = torch.optim.Adam(groups, betas=BETAS, foreach=False)

    def take_step(self, backward: Callable[[], float]) -> float:
        """One step along what `backward` leaves as gradients; returns its loss. Raises QtipError where that is not finite."""
        self._adam.zero_grad(set_to_none=True)
        loss = backward()
        if not math.isfinite(loss):
            raise QtipError(
                f"the loss of tuning is {loss} after {self.step} steps", "tune with a lower learning rate, and without autocast"
            )
        if self._reduce is not None:
            self._reduce(self.trained.masters.values())
        share = self._share()
        for group, rate in zip(self._adam.param_groups, self.trained.rates.values(), strict=True):
            group["lr"] = rate * share
        self._adam.step()
        self.step += 1
        return loss

    def _share(self) -> float:
        warm = min(1.0, (self.step + 1) / WARM_UP_STEPS)
        cosine = 0.5 * (1 + math.cos(math.pi * self.step / max(1, self.steps)))
        return warm * cosine

    def judge(self, heldout: Callable[[], float]) -> float:
        """Measure the state as it would be stored, and keep it if it is the best; returns its loss."""
        with self.trained.rounded():
            loss = heldout()
        if loss < self.best_loss:
            self.best, self.best_loss = self.trained.stored(), loss
        return loss

    def state(self) -> dict[str, Tensor]:
        """All that decides what comes, as tensors: masters, moments, counters, the best state."""
        tensors = {"step": torch.tensor(self.step), "best_loss": torch.tensor(self.best_loss, dtype=torch.float64)}
        tensors |= {f"best/{name}": tensor for name, tensor in self.best.items()}
        for name, master in self.trained.masters.items():
            tensors[f"master/{name}"] = master.detach().cpu()
            for part, tensor in self._adam.state.get(master, {}).items():
                tensors[f"{part}/{name}"] = tensor.detach().cpu()
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state` returned."""
        self.step, self.best_loss = int(tensors["step"]), float(tensors["best_loss"])
        self.best = {name: tensors[f"best/{name}"] for name in self.trained.names}
        self.trained.load({name: tensors[f"master/{name}"] for name in self.trained.masters})
        for name, master in self.trained.masters.items():
            found = {part: tensors[f"{part}/{name}"] for part in ADAM_PARTS if f"{part}/{name}" in tensors}
            if found:
                # Its own count of steps stays on the CPU, where Adam keeps it.
                self._adam.state[master] = {
                    part: tensor.to("cpu" if part == "step" else master.device, copy=True) for part, tensor in found.items()
                }


def order(count: int, seed: int, epoch: int) -> list[int]:
    """The order in which `count` things come in an epoch: that of random 64-bit numbers (see data.windows)."""
    draws = np.random.PCG64([seed, epoch]).random_raw(count)
    return np.argsort(draws, kind="stable").tolist()


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit`; 1 where the limit is less."""
    return max((divisor for divisor in range(1, number + 1) if number % divisor == 0 and divisor <= limit), default=1)
