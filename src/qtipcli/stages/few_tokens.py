"""Owns the Hessian of an expert that saw few tokens: its own, mixed with the mean of the experts beside it.

A covariance of I values estimated from n samples errs by about sqrt(I / n) of itself in every direction. So below
`FEW_TOKENS` * I tokens an expert is rounded under (n H_own + I H_shared) / (n + I), as if the prior were worth I samples, where
H_shared is the mean over all tokens of all experts of the layer at the same place. Without a token of its own that is H_shared.
Source: linear shrinkage of a covariance (Ledoit and Wolf 2004, J. Multivariate Analysis 88), with a target that is known better
than the identity and a weight that does not depend on the data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qtipcli.job.directory import RunDirectory
from qtipcli.model.linears import expert_place
from qtipcli.quant.correction import Evidence
from qtipcli.stages.calibrate import block_key

FEW_TOKENS = 8
"""Tokens for each input feature below which an expert's own Hessian is not trusted alone: it errs by a third of itself."""


@dataclass(frozen=True)
class Shared:
    """E[x x^T] over all experts of a layer at one place, float32 [I, I], and the number of tokens in that mean."""

    hessian_II: Tensor
    tokens: int


@dataclass(frozen=True)
class Moments:
    """What a group of layers is given, and what is missing there.

    known_II: of x x^T for the group's input x, float32 [I, I]: the sum over all tokens, or their mean where `is_mean`.
    tokens: in it. missing: full name of a layer -> what is missing at the place behind it (model.places), on all tokens and on
    the held-out ones. Empty where the streams cannot be compared: an expert sees other tokens in each. shared: of the experts
    of the layer, where the group is in one.
    """

    known_II: Tensor
    tokens: int
    missing: Mapping[str, tuple[Evidence, Evidence]] = field(default_factory=dict)
    shared: Shared | None = None
    is_mean: bool = False

    @property
    def hessian_II(self) -> Tensor:  # noqa: N802, dimensions are capitals
        """E[x x^T], float32."""
        return self.known_II if self.is_mean else self.known_II / max(self.tokens, 1)

    @property
    def share(self) -> float:
        """Weight of the shared Hessian in the one to round with."""
        features = len(self.known_II)
        if self.shared is None or not self.shared.tokens or self.tokens >= FEW_TOKENS * features:
            return 0.0
        return features / (self.tokens + features)

    @property
    def seen(self) -> bool:
        """Whether there is a Hessian to round with."""
        return self.tokens > 0 or self.share > 0

    def mixed(self) -> Tensor:
        """The Hessian to round with, in the place of `known_II`: nothing here is to be asked after it, nor what is missing."""
        hessian_II = self.known_II if self.is_mean else self.known_II.div_(max(self.tokens, 1))
        if self.shared is None or self.share == 0:
            return hessian_II
        return hessian_II.lerp_(self.shared.hessian_II.to(hessian_II), self.share)


class StoredMoments:
    """Moments of one block's groups as the calibrate stage stored them; its shard is checked first.

    block: the decoder block, by whose modules experts are known.
    """

    def __init__(self, calibration: RunDirectory, index: int, prefix: str, block: nn.Module) -> None:
        self._calibration, self._key = calibration, block_key(index)
        calibration.verify(self._key)
        self.groups: list[list[str]] = []
        self._tokens: dict[str, int] = {}
        for group in calibration.report(self._key)["groups"]:
            self.groups.append(group["names"])
            self._tokens[group["names"][0]] = group["tokens"]
        self._peers = peers_of(self.groups, prefix, block)
        self._shared: dict[str, Shared | None] = {}

    def of(self, names: Sequence[str], device: torch.device) -> Moments:
        """Of the group `names` (full names)."""
        first, place = names[0], self._peers.place(names[0])
        with self._calibration.open_shard(self._key) as shard:
            if place is not None and place not in self._shared:
                peers = [peer for peer in self._peers.at(place) if self._tokens[peer]]
                self._shared = {place: mean_of(peers, self._tokens, lambda name: shard.get_tensor(name).to(device))}
            # A copy, which may be written over: the shard's tensors are mapped from its file.
            hessian_II = shard.get_tensor(first).to(device, copy=True)
        return Moments(hessian_II, self._tokens[first], shared=self._shared.get(place or ""), is_mean=True)


class Peers:
    """Which groups of a block stand at one place in the experts of one layer."""

    def __init__(self, place_of: Mapping[str, str], firsts: Mapping[str, list[str]]) -> None:
        self._place_of, self._firsts = place_of, firsts

    def place(self, name: str) -> str | None:
        """The place of a layer, by its full name; None where it is in no expert."""
        return self._place_of.get(name)

    def at(self, place: str) -> list[str]:
        """The first names of the groups there, in the order of the groups."""
        return self._firsts[place]


def peers_of(groups: Sequence[Sequence[str]], prefix: str, block: nn.Module) -> Peers:
    """Of `groups` (full names) of the block called `prefix`."""
    place_of: dict[str, str] = {}
    firsts: dict[str, list[str]] = {}
    for names in groups:
        for name in names:
            place = expert_place(block, name.removeprefix(f"{prefix}."))
            if place is not None:
                place_of[name] = place
                firsts.setdefault(place, []).append(names[0])
    return Peers(place_of, firsts)


def mean_of(names: Sequence[str], tokens: Mapping[str, int], hessian: Callable[[str], Tensor]) -> Shared | None:
    """The mean of these Hessians, weighted by their tokens; None where there are none."""
    total = sum(tokens[name] for name in names)
    if not total:
        return None
    sum_II: Tensor | None = None
    for name in names:
        part = hessian(name) * (tokens[name] / total)
        sum_II = part if sum_II is None else sum_II.add_(part)
    return Shared(sum_II, total)
