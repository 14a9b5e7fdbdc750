"""Owns decoding on CPUs: windows cut from the words and looked up in the tabulated code, one row of tiles a worker.

The table is `codes.tabulate`, so the result equals the reference bit for bit for every code. It fits a second-level cache
(256 KiB at 16 state bits and one weight a step), where a look-up costs no more than computing the code and rounding it.
"""

from collections.abc import Iterator
from functools import lru_cache

import numba
import numpy as np
import torch

from qtipcli_kernels import codes
from qtipcli_kernels.packing import WALK_TO_TILE
from qtipcli_kernels.spec import TILE, WORD_BITS, TrellisSpec


def decode(trellis: torch.Tensor, spec: TrellisSpec, lut: torch.Tensor | None = None) -> torch.Tensor:
    """The weights that a packed matrix stands for; the contract of `reference.decode`, on Numba's threads."""
    return _decoded(trellis, _table(spec, lut), spec)


def strips(
    trellis: torch.Tensor, spec: TrellisSpec, lut: torch.Tensor | None, tile_rows: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Decode `tile_rows` rows of tiles at a time; the contract of `reference.strips`, with one table for all of them."""
    table = _table(spec, lut)
    for first in range(0, len(trellis), tile_rows):
        part = trellis[first : first + tile_rows]
        yield slice(first * TILE, (first + len(part)) * TILE), _decoded(part, table, spec)


def _decoded(trellis: torch.Tensor, table: np.ndarray, spec: TrellisSpec) -> torch.Tensor:
    weight_OI = np.empty((len(trellis) * TILE, trellis.shape[1] // spec.words_per_tile * TILE), np.float32)
    _kernel(spec.state_bits, spec.bits_per_step, spec.weights_per_step)(trellis.numpy().view(np.uint32), table, weight_OI)
    return torch.from_numpy(weight_OI)


def _table(spec: TrellisSpec, lut: torch.Tensor | None) -> np.ndarray:
    return _default_table(spec) if lut is None else codes.tabulate(spec, lut.detach()).numpy()


@lru_cache(maxsize=8)
def _default_table(spec: TrellisSpec) -> np.ndarray:
    return codes.tabulate(spec).numpy()


@lru_cache
def _kernel(state_bits: int, bits_per_step: int, weights_per_step: int):
    """The compiled decoder of one trellis, whatever the code: (words [O/16, I/16 * W], table [2^L, V], weight_OI out)."""
    spec = TrellisSpec("lut", bits_per_step, state_bits, weights_per_step)
    steps, tile_words, mask = spec.steps, spec.words_per_tile, np.uint64(spec.states - 1)
    rows, columns = (WALK_TO_TILE // TILE).numpy(), (WALK_TO_TILE % TILE).numpy()

    @numba.njit(parallel=True, nogil=True, cache=True)
    def kernel(words, table, weight_OI):
        for tile_row in numba.prange(words.shape[0]):
            for tile in range(words.shape[1] // tile_words):
                for step in range(steps):
                    word, offset = step * bits_per_step // WORD_BITS, step * bits_per_step % WORD_BITS
                    first = np.uint64(words[tile_row, tile * tile_words + word])
                    second = np.uint64(words[tile_row, tile * tile_words + (word + 1) % tile_words])
                    # A window spans at most two words: bits offset .. offset + L - 1 of their 64.
                    window = (first << np.uint64(WORD_BITS)) | second
                    state = (window >> np.uint64(2 * WORD_BITS - state_bits - offset)) & mask
                    for value in range(weights_per_step):
                        place = step * weights_per_step + value
                        weight_OI[tile_row * TILE + rows[place], tile * TILE + columns[place]] = table[state, value]

    return kernel
