"""Tests of encoding in smaller batches. Oracle: the encoder on all tiles at once."""

from __future__ import annotations

import pytest
import torch

from qtipcli.quant.batches import LEAST_TILES, InBatches
from qtipcli.quant.matrix import RoundingSettings, round_group
from qtipcli.quant.transform import Transform
from qtipcli_kernels.codes import tabulate
from qtipcli_kernels.dispatch import encode
from qtipcli_kernels.spec import TrellisSpec
from quant.matrices import correlated_hessian, gaussian

SPEC = TrellisSpec.at_bits("3inst", 2.0, 8)

SHORTAGES = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
]


class Small:
    """An encoder with room for so many tiles."""

    def __init__(self, room: int, shortage: BaseException) -> None:
        self.room, self.shortage = room, shortage
        self.sizes: list[int] = []

    def __call__(self, tiles, spec, table, fast=False):
        if len(tiles) > self.room:
            raise self.shortage
        self.sizes.append(len(tiles))
        return encode(tiles, spec, table, fast)


@pytest.mark.parametrize("shortage", SHORTAGES)
def test_tiles_are_halved_until_they_fit(shortage: BaseException) -> None:
    tiles, table, said = gaussian(200, 256), tabulate(SPEC), []
    small = Small(60, shortage)
    batched = InBatches(said.append, small)
    assert torch.equal(batched(tiles, SPEC, table), encode(tiles, SPEC, table))
    assert said == [100, 50]
    assert small.sizes == [50] * 4
    assert torch.equal(batched(tiles[:120], SPEC, table), encode(tiles[:120], SPEC, table))
    assert small.sizes[4:] == [50, 50, 20], "what did not fit before is not tried again"


def test_the_smallest_batch_is_the_last_try() -> None:
    tried: list[int] = []
    with pytest.raises(MemoryError):
        InBatches(tried.append, Small(LEAST_TILES - 1, MemoryError()))(gaussian(70, 256), SPEC, tabulate(SPEC))
    assert tried == [35, 17, 16]


def test_other_failures_are_not_tried_again() -> None:
    tried: list[int] = []
    with pytest.raises(RuntimeError, match="illegal"):
        InBatches(tried.append, Small(1, RuntimeError("an illegal memory access")))(gaussian(70, 256), SPEC, tabulate(SPEC))
    assert not tried


def test_no_tiles_are_no_walks() -> None:
    assert InBatches(lambda size: None)(gaussian(0, 256), SPEC, tabulate(SPEC)).shape == (0, 256)


@pytest.mark.parametrize("room", [16, 18])
def test_a_matrix_is_rounded_to_the_same_bits(room: int) -> None:
    weights, hessian, settings = {"a": gaussian(320, 96)}, correlated_hessian(96), RoundingSettings(Transform(), 1e-3, True)
    whole = round_group(weights, hessian, {"a": SPEC}, settings, {"a": None})["a"]
    batched = InBatches(lambda size: None, Small(room, MemoryError()))
    parts = round_group(weights, hessian, {"a": SPEC}, settings, {"a": None}, encode=batched)["a"]
    assert batched.most == 16
    assert torch.equal(whole.trellis, parts.trellis)
    assert whole.relative_proxy_loss == parts.relative_proxy_loss
