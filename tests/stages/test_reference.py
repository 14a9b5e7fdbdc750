"""The original's logits, kept. Oracle: the logits themselves, bit for bit, and how often they were asked for."""

from __future__ import annotations

import gc
import os
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qtipcli.errors import StorageError
from qtipcli.stages import reference
from qtipcli.stages.evaluate import Logits
from qtipcli.stages.progress import Silent
from qtipcli.stages.reference import KeptLogits

ROWS, POSITIONS, VOCABULARY = 5, 3, 7


class Counted(Logits):
    """Random logits, and the windows that were asked for."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = str(dtype)
        self.all = torch.randn(ROWS, POSITIONS, VOCABULARY, generator=torch.Generator().manual_seed(0)).to(dtype)
        self.asked: list[int] = []

    def logits(self, index: int) -> torch.Tensor:
        self.asked.append(index)
        return self.all[index]


class Notes(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", range(ROWS + 1))
def test_kept_or_not_the_logits_are_those_of_the_source(dtype, kept):
    source, watcher = Counted(dtype), Notes()
    window_bytes = POSITIONS * VOCABULARY * dtype.itemsize
    # One byte less than another window would take: the cap is a cap.
    held = KeptLogits(source, ROWS, (kept + 1) * window_bytes - 1, watcher)
    assert held.kept == kept
    for _ in range(2):
        for index in range(ROWS):
            found = held.logits(index)
            assert found.dtype == dtype and torch.equal(found, source.all[index])
    assert [source.asked.count(index) for index in range(kept)] == [1] * kept
    # Window 0 is computed once more where nothing is kept: its size was not known before.
    assert [source.asked.count(index) for index in range(kept, ROWS)] == [2 + (not index) for index in range(kept, ROWS)]
    assert len(watcher.said) == (kept < ROWS)
    if watcher.said:
        assert f"{kept} of {ROWS} windows are kept" in watcher.said[0]
    held.close()


def test_the_source_is_let_go_once_all_is_kept():
    source = Counted(torch.float32)
    gone = weakref.ref(source)
    held = KeptLogits(source, ROWS, 2**20, Silent())
    del source
    gc.collect()
    assert gone() is None
    assert held.logits(ROWS - 1).shape == (POSITIONS, VOCABULARY)


def test_half_of_the_free_space_is_left_to_others(monkeypatch):
    window_bytes = POSITIONS * VOCABULARY * 4
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=4 * window_bytes))
    assert KeptLogits(Counted(torch.float32), ROWS, 2**20, Silent()).kept == 2


def open_below(directory: Path) -> list[str]:
    """Where this process's open files lie, of those below `directory`; deleted ones too. The listing's own is gone by then."""
    links = [file for file in Path("/proc/self/fd").iterdir() if file.is_symlink()]
    return [target for target in map(str, map(Path.readlink, links)) if target.startswith(str(directory))]


def test_the_file_has_no_name_and_its_space_comes_back(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    held = KeptLogits(Counted(torch.float32), ROWS, 2**20, Silent())
    assert not list(tmp_path.iterdir())
    assert [target.endswith("(deleted)") for target in open_below(tmp_path)] == [True]
    held.close()
    assert not open_below(tmp_path)


def test_a_file_that_cannot_be_written_is_a_storage_error(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StorageError, match="disk is full"):
        KeptLogits(Counted(torch.float32), ROWS, 2**20, Silent())


def test_the_default_holds_what_its_comment_says():
    assert 64 * 2047 * 32_000 * 4 <= reference.DEFAULT_CACHE_GIB * 2**30 < 67 * 2047 * 32_000 * 4
