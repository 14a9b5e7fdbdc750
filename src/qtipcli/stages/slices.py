"""Owns how sums over the calibration text are taken, so that no number of processes changes a bit of them.

The text is cut into slices, whose number belongs to the job. The sum over a slice is taken in the order of its batches, and
these sums are added in the order of the slices, in float32. Of W processes, process r has the slices r, r + W, r + 2 W and so
on; the running total goes from the owner of a slice to that of the next. So one process keeps two sums, the running total
and that of its slice, and so does each of several.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from qtipcli.job.processes import ALONE, Processes, Sent
from qtipcli.stages.progress import Watcher

DEFAULT_SLICES = 8
"""So many processes can share the text. More cost messages, and batches that are smaller where there is little text."""

Unit = TypeVar("Unit")


@dataclass(frozen=True)
class Slices:
    """Which slices this one of `processes` has.

    count: of all. own: number of each slice that this process has -> its batches, as places in the list of this process's own.
    """

    count: int
    own: Mapping[int, range]
    processes: Processes = ALONE

    @classmethod
    def whole(cls, batches: int) -> Slices:
        """One slice of all batches."""
        return cls(1, {0: range(batches)})


def cut(count: int, slices: int) -> list[range]:
    """0 to count - 1 in at most `slices` neighbouring ranges, none empty; the first ones have one more if some have."""
    parts = min(count, slices)
    size, more = divmod(count, parts)
    starts = [part * size + min(part, more) for part in range(parts + 1)]
    return [range(*pair) for pair in itertools.pairwise(starts)]


def share_out(batches: Sequence[Sequence[Unit]], processes: Processes, before: int = 0) -> tuple[list[Unit], Slices]:
    """(this process's batches, slice after slice; where they are). batches: of each slice. before: batches it has already."""
    mine: list[Unit] = []
    own: dict[int, range] = {}
    for number in range(processes.rank, len(batches), processes.world):
        own[number] = range(before + len(mine), before + len(mine) + len(batches[number]))
        mine.extend(batches[number])
    return mine, Slices(len(batches), own, processes)


@dataclass(frozen=True)
class Text:
    """This process's part of the calibration windows.

    batches: int64 [rows, context] each; none holds rows of two slices. first_rows: the number of the first row of each.
    rows: of all processes. row: [1, context], the first of all.
    """

    batches: list[Tensor]
    first_rows: list[int]
    rows: int
    row: Tensor
    slices: Slices

    def heldout(self, share: int) -> list[Tensor]:
        """For each batch, bool [tokens]: those of one row in `share`, counted over all processes; of the last where few."""
        every = min(share, self.rows)
        held = torch.arange(self.rows) % every == every - 1 if self.rows > 1 else torch.zeros(self.rows, dtype=torch.bool)
        return [
            held[first : first + len(batch)].repeat_interleave(batch.shape[1])
            for first, batch in zip(self.first_rows, self.batches, strict=True)
        ]


def text_of(tokens: Tensor, slices: int, most_rows: int, processes: Processes = ALONE) -> Text:
    """Cut tokens, int64 [rows, context], into at most `slices` slices and those into batches of at most `most_rows` rows."""
    units = [
        [(rows.start + start, part) for start, part in _batches(tokens[rows.start : rows.stop], most_rows)]
        for rows in cut(len(tokens), slices)
    ]
    mine, own = share_out(units, processes)
    return Text([batch for _, batch in mine], [first for first, _ in mine], len(tokens), tokens[:1], own)


def _batches(rows: Tensor, most_rows: int) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(rows), most_rows):
        yield start, rows[start : start + most_rows]


def note_idle(slices: Slices, watcher: Watcher) -> None:
    """Say where processes have no text."""
    idle = slices.processes.world - slices.count
    if idle > 0:
        watcher.note(
            f"{idle} of {slices.processes.world} processes have no text: it is cut into {slices.count} slices. Calibrate with "
            "more --slices, and at least as many --samples, to share it among more"
        )


class OrderedSums:
    """Float32 sums by name over all slices; each process adds those of its own.

    shapes: name -> shape, the same in every process. `counts`, `deliver` and `everywhere` are collective, each once, and come
    after the last `add`.
    """

    def __init__(self, slices: Slices, shapes: Mapping[str, tuple[int, ...]], device: torch.device) -> None:
        self._slices, self._shapes, self._device = slices, shapes, device
        self._processes = slices.processes
        self._holder = (slices.count - 1) % self._processes.world
        self._total: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._sent: list[Sent] = []

    def add(self, number: int, sums: Mapping[str, Tensor], counts: Mapping[str, int]) -> None:
        """The sums over slice `number` of this process, and how many there were; in the order of the slices.

        The tensors belong to this object from now on. A name that is not in `sums` counts for zeros.
        """
        for name, count in counts.items():
            self._counts[name] = self._counts.get(name, 0) + count
        if self._processes.is_alone:
            for name, part in sums.items():
                self._total[name] = self._total[name].add_(part) if name in self._total else part
            return
        self._settle()
        for name in self._shapes:
            part = sums[name] if name in sums else self._empty(name).zero_()
            if number > 0:
                before = torch.empty_like(part)
                self._processes.receive(before, (number - 1) % self._processes.world)
                part.add_(before)  # the order of the two does not matter
            if number + 1 < self._slices.count:
                self._sent.append(self._processes.send(part, (number + 1) % self._processes.world))
            else:
                self._total[name] = part

    def counts(self, names: Sequence[str]) -> dict[str, int]:
        """The counts under these names over all slices, in every process."""
        found = self._processes.sum_numbers(*(self._counts.get(name, 0) for name in names))
        return {name: int(count) for name, count in zip(names, found, strict=True)}

    def deliver(self, owners: Mapping[str, int]) -> dict[str, Tensor]:
        """The totals that this process is the owner of; owners: name -> process, for every name. It is left without others."""
        if self._processes.is_alone:
            return self._total
        found: dict[str, Tensor] = {}
        rank = self._processes.rank
        for name, owner in owners.items():
            if rank == self._holder and rank != owner:
                self._sent.append(self._processes.send(self._total.pop(name), owner))
            elif rank == owner:
                found[name] = self._total.pop(name) if rank == self._holder else self._empty(name)
                if rank != self._holder:
                    self._processes.receive(found[name], self._holder)
        self._settle()
        return found

    def everywhere(self) -> dict[str, Tensor]:
        """All totals, in every process."""
        if self._processes.is_alone:
            return self._total
        for name in self._shapes:
            if self._processes.rank != self._holder:
                self._total[name] = self._empty(name)
            self._processes.broadcast_(self._total[name], self._holder)
        self._settle()
        return self._total

    def _empty(self, name: str) -> Tensor:
        return torch.empty(self._shapes[name], device=self._device)

    def _settle(self) -> None:
        for sent in self._sent:
            sent.wait()
        self._sent = []
