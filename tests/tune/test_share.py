"""Which windows a process takes. Oracle: the text cut into steps; whatever the processes, together they take each once."""

from __future__ import annotations

import itertools

import pytest
import torch

from qtipcli.tune.share import share_of


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize(("rows", "heldout", "batch"), [(16, 4, 4), (17, 3, 4), (9, 4, 5), (4, 4, 4)])
def test_the_shares_of_all_processes_are_the_text(world: int, rows: int, heldout: int, batch: int) -> None:
    tokens = torch.arange(rows).unsqueeze(1)
    expected = [*(tokens[:-heldout].split(batch) if rows > heldout else ()), tokens[-heldout:]]
    for most_rows in (1, 2, 8):
        shares = [share_of(tokens, heldout, batch, most_rows, rank, world) for rank in range(world)]
        for step, whole in enumerate(expected):
            pieces = [
                share.pieces[index]
                for share in shares
                for index in (share.held if step == len(expected) - 1 else share.steps[step])
            ]
            assert torch.equal(torch.cat(pieces), whole)
            assert all(len(piece) <= most_rows for piece in pieces)
        for share in shares:
            assert [*itertools.chain(*share.steps), *share.held] == list(range(len(share.pieces)))
            assert list(share.rows) == [len(whole) for whole in expected[:-1]]


def test_no_process_has_two_windows_more_than_another() -> None:
    for world, batch in itertools.product(range(1, 6), range(5, 9)):
        shares = [share_of(torch.arange(batch + 5).unsqueeze(1), 5, batch, 8, rank, world) for rank in range(world)]
        for sizes in ([sum(len(share.pieces[index]) for index in share.steps[0]) for share in shares],):
            assert max(sizes) - min(sizes) <= 1
