"""Sums over slices of text. Oracle: one loop that adds the slices' sums in their order. Tolerance: none, equal bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from job.test_processes import in_each

from qtipcli.job.processes import Processes, together
from qtipcli.stages.progress import Silent
from qtipcli.stages.slices import OrderedSums, cut, note_idle, share_out, text_of

SHAPES: dict[str, tuple[int, ...]] = {"a": (3, 3), "b": (2, 5)}
OWNERS = {"a": 1, "b": 0}


def part(number: int, name: str) -> torch.Tensor:
    """The sum over a slice; sizes that differ, so that another order of the sum has other bits."""
    generator = torch.Generator().manual_seed(number)
    return torch.randn(SHAPES[name], generator=generator) * 10.0 ** (number % 4)


def total(count: int, name: str, absent: int | None = None) -> torch.Tensor:
    found = part(0, name)
    for number in range(1, count):
        if number != absent:
            found = found + part(number, name)
    return found


def test_another_order_has_other_bits() -> None:
    backwards = part(7, "a")
    for number in reversed(range(7)):
        backwards = backwards + part(number, "a")
    assert not torch.equal(backwards, total(8, "a"))


@pytest.mark.parametrize(("count", "slices"), [(1, 8), (7, 8), (8, 8), (30, 8), (9, 2), (64, 64), (5, 1)])
def test_slices_are_neighbours_of_nearly_one_size(count: int, slices: int) -> None:
    ranges = cut(count, slices)
    assert [place for each in ranges for place in each] == list(range(count))
    assert len(ranges) == min(count, slices)
    sizes = [len(each) for each in ranges]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1


@pytest.mark.parametrize("world", [1, 2, 3, 5, 9])
def test_text_does_not_depend_on_the_number_of_processes(world: int) -> None:
    """Batches, and which of their rows are held out, are those of one process, each of them once."""
    tokens = torch.arange(30 * 4).reshape(30, 4)
    one = text_of(tokens, 8, 3)
    assert all(len(batch) <= 3 for batch in one.batches)
    assert torch.equal(torch.cat(one.batches), tokens)
    held = torch.cat(one.heldout(8))
    assert torch.equal(held.reshape(30, 4)[:, 0].nonzero().flatten(), torch.tensor([7, 15, 23]))
    found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for rank in range(world):
        text = text_of(tokens, 8, 3, Processes(rank, world))
        assert text.slices.count == 8
        for places in text.slices.own.values():
            for place in places:
                found[text.first_rows[place]] = text.batches[place], text.heldout(8)[place]
    oracle = dict(zip(one.first_rows, zip(one.batches, one.heldout(8), strict=True), strict=True))
    assert found.keys() == oracle.keys()
    for first, (batch, kept) in oracle.items():
        assert torch.equal(found[first][0], batch)
        assert torch.equal(found[first][1], kept)


def test_few_rows_hold_out_the_last() -> None:
    tokens = torch.arange(12).reshape(3, 4)
    assert [bool(kept.any()) for kept in text_of(tokens, 8, 1).heldout(8)] == [False, False, True]
    assert not text_of(tokens[:1], 8, 1).heldout(8)[0].any()


def sums(slices: Any, absent: int | None = None) -> OrderedSums:
    found = OrderedSums(slices, SHAPES, torch.device("cpu"))
    for number in slices.own:
        parts = {name: part(number, name) for name in SHAPES if number != absent}
        found.add(number, parts, dict.fromkeys(parts, number + 1))
    return found


@pytest.mark.parametrize("absent", [None, 5])
def test_alone_the_slices_are_added_in_their_order(absent: int | None) -> None:
    _, slices = share_out([[number] for number in range(8)], Processes())
    found = sums(slices, absent)
    assert found.counts(["a"]) == {"a": 36 - (absent + 1 if absent else 0)}
    assert all(torch.equal(tensor, total(8, name, absent)) for name, tensor in found.everywhere().items())


@pytest.mark.parametrize(("world", "count"), [(2, 8), (3, 8), (4, 2), (2, 1)])
def test_together_the_bits_are_those_of_one(world: int, count: int) -> None:
    def work(rank: int) -> None:
        with together() as processes:
            _, slices = share_out([[number] for number in range(count)], processes)
            assert sorted(slices.own) == list(range(rank, count, world))
            first, second = sums(slices), sums(slices, absent=count - 1 if count > 1 else None)
            assert first.counts(["a", "b"]) == dict.fromkeys("ab", count * (count + 1) // 2)
            delivered = first.deliver(OWNERS)
            assert sorted(delivered) == [name for name, owner in OWNERS.items() if owner == rank]
            assert all(torch.equal(tensor, total(count, name)) for name, tensor in delivered.items())
            everywhere = second.everywhere()
            assert sorted(everywhere) == sorted(SHAPES)
            absent = count - 1 if count > 1 else None
            assert all(torch.equal(tensor, total(count, name, absent)) for name, tensor in everywhere.items())

    assert in_each(world, work) == [0] * world


def test_processes_without_text_are_said() -> None:
    heard: list[str] = []

    class Ear(Silent):
        def note(self, text: str) -> None:
            heard.append(text)

    for world in (1, 2, 3):
        note_idle(share_out([[1], [2]], Processes(0, world))[1], Ear())
    assert len(heard) == 1
    assert "1 of 3 processes have no text: it is cut into 2 slices" in heard[0]
