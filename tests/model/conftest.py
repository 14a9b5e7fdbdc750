"""Owns the fixtures of the tests of qtipcli.model: each tiny checkpoint is written once a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .tiny_models import save


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """label -> directory of that tiny model; read only."""
    written: dict[str, Path] = {}

    def get(label: str) -> Path:
        if label not in written:
            written[label] = save(label, tmp_path_factory.mktemp(label))
        return written[label]

    return get
