"""Which process does what, and how results and tiles travel. Oracle: one process."""

from __future__ import annotations

import pytest
import torch
from job.test_processes import in_each

from qtipcli.job.processes import Processes, together
from qtipcli.stages import shared_encoder, spread
from qtipcli.stages.shared_encoder import SharedEncoder
from qtipcli.stages.spread import Parcel, least_loaded, rounding_cost
from qtipcli_kernels.codes import tabulate
from qtipcli_kernels.dispatch import encode
from qtipcli_kernels.spec import TrellisSpec

SPEC = TrellisSpec.at_bits("3inst", 2, 8)


def test_the_dearest_go_first_to_the_least_loaded() -> None:
    loads = [0.0, 4.0]
    assert least_loaded({"small": 1, "large": 9, "middle": 6}, loads) == {"small": 0, "large": 0, "middle": 1}
    assert loads == [10, 10]
    assert list(least_loaded({"b": 1, "a": 1}, [0.0, 0.0]).items()) == [("b", 0), ("a", 1)]


def test_no_process_is_behind_by_more_than_the_dearest_piece() -> None:
    """However many blocks went before: loads are carried on."""
    loads = [0.0] * 5
    for _ in range(20):
        least_loaded({"qkv": 3, "o": 1, "gate": 5.4, "down": 2.7}, loads)
        assert max(loads) - min(loads) <= 5.4


def test_a_cost_is_the_encoders_and_the_factors() -> None:
    assert rounding_cost(1000, 0, 16, 1) == 16 * rounding_cost(1000, 0, 12, 1) == 2 * rounding_cost(1000, 0, 16, 2)
    assert rounding_cost(0, 20, 16, 1) == 8 * rounding_cost(0, 10, 16, 1) > 0


def parcel() -> Parcel:
    tensors = {
        "x.trellis": torch.arange(12, dtype=torch.int32).reshape(3, 4).T,
        "x.scale_in": torch.ones(3, dtype=torch.float16),
    }
    return Parcel(tensors, {"layers": {"x": {"loss": 0.1 + 0.2, "none": None, "nan": float("nan")}}, "seconds": 1.5})


def same(found: Parcel, oracle: Parcel) -> bool:
    return (
        found.tensors.keys() == oracle.tensors.keys()
        and all(torch.equal(found.tensors[name], tensor) for name, tensor in oracle.tensors.items())
        and all(found.tensors[name].dtype == tensor.dtype for name, tensor in oracle.tensors.items())
        and repr(found.report) == repr(oracle.report)
    )


@pytest.mark.parametrize("oracle", [parcel(), Parcel({}, {"left": {"a": "why"}})])
def test_a_parcel_arrives_as_it_was_sent(oracle: Parcel) -> None:
    assert same(Parcel.unpacked(oracle.packed()), oracle)


def test_parcels_travel_to_one_and_to_all() -> None:
    def work(rank: int) -> None:
        with together() as processes:
            if rank == 1:
                for sent in spread.send(processes, parcel(), 0):
                    sent.wait()
            elif rank == 0:
                assert same(spread.receive(processes, 1), parcel())
            assert same(spread.exchange(processes, parcel() if rank == 2 else None, 2), parcel())

    assert in_each(3, work) == [0, 0, 0]


@pytest.mark.parametrize("world", [2, 3])
def test_shared_tiles_have_the_walks_that_one_process_finds(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts of tiles that divide evenly, that do not, that leave processes without any, and that are not worth sharing."""
    monkeypatch.setattr(shared_encoder, "LEAST_WORK", {"cpu": 0})
    table = tabulate(SPEC)
    cases = {count: torch.randn(count, 256, generator=torch.Generator().manual_seed(count)) for count in (1, 2, 3, 7, 12)}
    oracle = {count: encode(tiles, SPEC, table) for count, tiles in cases.items()}

    def work(rank: int) -> None:
        with together() as processes:
            shared = SharedEncoder(processes)
            for count, tiles in cases.items():
                assert torch.equal(shared(tiles, SPEC, table, False), oracle[count])

    assert in_each(world, work) == [0] * world


def test_each_process_searches_its_share_only(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def counted(tiles: torch.Tensor, *rest: object) -> torch.Tensor:
        seen.append(len(tiles))
        return torch.zeros(len(tiles), SPEC.steps, dtype=torch.int32)

    class Group(Processes):
        def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
            return [tensor] * self.world

    monkeypatch.setattr(shared_encoder, "LEAST_WORK", {"cpu": 0})
    for rank in range(4):
        SharedEncoder(Group(rank, 4), counted)(torch.zeros(18, 256), SPEC, torch.zeros(1), False)
    assert seen == [6, 6, 6]  # whole pairs, which the encoder takes at once; none are left for the last
    monkeypatch.setattr(shared_encoder, "LEAST_WORK", {"cpu": 1 << 62})
    SharedEncoder(Group(0, 4), counted)(torch.zeros(18, 256), SPEC, torch.zeros(1), False)
    assert seen[-1] == 18
