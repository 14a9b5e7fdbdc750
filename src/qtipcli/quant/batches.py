"""Owns the encoding of tiles in smaller batches where memory runs out. A tile's walk depends on nothing but the tile."""

from __future__ import annotations

from collections.abc import Callable

import torch

from qtipcli.errors import is_out_of_memory
from qtipcli.quant.scale import Encode
from qtipcli_kernels.dispatch import encode
from qtipcli_kernels.spec import TrellisSpec

LEAST_TILES = 16
"""Tiles of a batch that is not cut any further: with their walks they take less than a megabyte."""


class InBatches:
    """Encodes as `encode` does, all tiles at once until memory runs out, and then half as many each time that it does.

    Attributes:
        most: tiles in a batch; None for all. It stays for the calls that follow.

    Args:
        smaller: told the new size of a batch.
        encode: what encodes a batch.
    """

    def __init__(self, smaller: Callable[[int], None], encode: Encode = encode) -> None:
        self.most: int | None = None
        self._smaller, self._encode = smaller, encode

    def __call__(self, tiles: torch.Tensor, spec: TrellisSpec, table: torch.Tensor, fast: bool = False) -> torch.Tensor:
        """The states, int32 [N, T]. Raises what the encoder raises where a batch of LEAST_TILES does not fit either."""
        done: list[torch.Tensor] = []
        start = 0
        while start < len(tiles) or not done:
            batch = tiles[start : start + self.most] if self.most else tiles[start:]
            states = self._try(batch, spec, table, fast)
            if states is not None:
                done.append(states)
                start += len(batch)
                continue
            if tiles.is_cuda:
                torch.cuda.empty_cache()
            self.most = max(LEAST_TILES, len(batch) // 2)
            self._smaller(self.most)
        return done[0] if len(done) == 1 else torch.cat(done)

    def _try(self, batch: torch.Tensor, spec: TrellisSpec, table: torch.Tensor, fast: bool) -> torch.Tensor | None:
        """None where memory ran out: what the failed call held is given back when this returns."""
        try:
            return self._encode(batch, spec, table, fast)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or len(batch) <= LEAST_TILES:
                raise
            return None
