"""One worker for all tests of this folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from fuzz.worker import Worker


@pytest.fixture(scope="session")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """The process that tries cases, with valid directories beside."""
    pytest.importorskip("peft")
    started = Worker(tmp_path_factory.mktemp("fuzz"))
    yield started
    started.close()


@pytest.fixture(scope="session")
def valid_directories(worker: Worker) -> Path:
    """packed, source, job and adapter; read only."""
    return worker.folder / "valid"


@pytest.fixture
def packed(valid_directories: Path, tmp_path: Path) -> Path:
    """A packed directory to damage."""
    return Path(shutil.copytree(valid_directories / "packed", tmp_path / "packed"))
