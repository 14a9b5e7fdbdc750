"""Owns the encoder of several processes: each searches the walks of its share of the tiles, and all get all of them.

The search is nearly all of the time that rounding takes. Around it every process computes the same, to the same bits, so that
nothing else need be sent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtipcli.job.processes import Processes
from qtipcli.quant.scale import Encode
from qtipcli_kernels.dispatch import encode
from qtipcli_kernels.spec import TrellisSpec

TILES_TOGETHER = 2
"""Tiles that the CPU's encoder takes at once (qtipcli_kernels.viterbi.cpu.GROUP): shares are multiples of it."""

LEAST_WORK = {"cpu": 1 << 21, "cuda": 1 << 27}
"""Steps times states by kind of device below which each process encodes all tiles itself: a message takes some 0.1 ms on CPUs,
where 2 G such pairs are looked at a second, and 0.05 ms between GPUs, which look at a thousand times as many."""


class SharedEncoder:
    """As dispatch.encode, which all `processes` call with the same tiles; the walk of a tile does not depend on other tiles.

    encode: what encodes a process's share.
    """

    def __init__(self, processes: Processes, encode: Encode = encode) -> None:
        self._processes, self._encode = processes, encode

    def __call__(self, tiles: Tensor, spec: TrellisSpec, table: Tensor, fast: bool) -> Tensor:
        """See dispatch.encode."""
        rank, world = self._processes.rank, self._processes.world
        work = len(tiles) * spec.steps * 2**spec.state_bits
        if world == 1 or len(tiles) <= TILES_TOGETHER or work < LEAST_WORK.get(tiles.device.type, 0):
            return self._encode(tiles, spec, table, fast)
        share = -(-len(tiles) // (TILES_TOGETHER * world)) * TILES_TOGETHER
        own = tiles[rank * share : (rank + 1) * share]
        states = torch.zeros(share, spec.steps, dtype=torch.int32, device=tiles.device)
        if len(own):
            states[: len(own)] = self._encode(own, spec, table, fast)
        return torch.cat(self._processes.gather(states))[: len(tiles)]
