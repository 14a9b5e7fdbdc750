"""Owns ways to break the product on purpose: with `--break NAME` the harness must find it and end with status 1.

What is broken is a function of the product, in the harness's process, before the commands are forked from it.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file


def _no_sync_of_files() -> None:
    """No fsync before the rename: a name may survive without its bytes."""
    from qtipcli.job import files

    def write_atomic(path: Path, chunks: Any) -> tuple[str, int]:
        fsync, os.fsync = os.fsync, lambda descriptor: None
        try:
            return original(path, chunks)
        finally:
            os.fsync = fsync

    original = files.write_atomic
    for module in _modules_with("write_atomic"):
        module.write_atomic = write_atomic


def _no_sync_of_directories() -> None:
    """A rename that nothing makes durable."""
    for module in _modules_with("sync_directory"):
        module.sync_directory = lambda directory: None


def _copies_not_synced() -> None:
    """A packed model whose copied files are in no order with its rename."""
    from qtipcli.stages import whole

    whole.sync_tree = lambda directory: None


def _no_lock() -> None:
    """The lock of a job and of a result is not taken."""
    from qtipcli.job.lock import Lock

    def attempt(self: Lock) -> int:
        return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)

    Lock._attempt = attempt


def _no_checksums() -> None:
    """What was read is believed."""
    from qtipcli.job import directory
    from qtipcli.job.directory import RunDirectory

    RunDirectory._check = lambda self, key, in_full: None
    directory.read_shard = lambda path, sha256=None: load_file(path)


def _ledger_without_checks() -> None:
    """A changed digit in a report passes for what was measured."""
    from qtipcli.job import ledger

    ledger.checksum = lambda fields: "0" * 16


def _ledger_first() -> None:
    """The ledger says that a shard is done before it is there."""
    from qtipcli.job import directory
    from qtipcli.job.ledger import Entry
    from qtipcli.job.shards import _layout, _tensor_bytes

    def commit(self: Any, key: str, tensors: Any, report: Any = None, metadata: Any = None) -> None:
        content = {**(metadata or {}), "qtip_shard": key}
        names, header, size = _layout(tensors, content)
        sha256 = hashlib.sha256(header + b"".join(bytes(_tensor_bytes(tensors[name])) for name in names)).hexdigest()
        self._ledger.append(Entry(key, f"{key}.safetensors", len(header) + size, sha256, dict(report or {})))
        directory.write_shard(self.path / f"{key}.safetensors", tensors, content)

    directory.RunDirectory.commit = commit


def _no_finite_check() -> None:
    """NaN in weights is rounded like any number."""
    for module in _modules_with("check_finite"):
        module.check_finite = lambda name, tensor: None


def _modules_with(name: str) -> list[Any]:
    return [module for label, module in sys.modules.items() if label.startswith("qtipcli.") and hasattr(module, name)]


BREAKS: dict[str, Callable[[], None]] = {
    "nothing": lambda: None,
    "no-fsync": _no_sync_of_files,
    "no-directory-fsync": _no_sync_of_directories,
    "copies-not-synced": _copies_not_synced,
    "no-lock": _no_lock,
    "no-checksums": _no_checksums,
    "ledger-without-checks": _ledger_without_checks,
    "ledger-first": _ledger_first,
    "no-finite-check": _no_finite_check,
}

FOUND_BY: dict[str, str] = {
    "no-fsync": "power cut",
    "no-directory-fsync": "power cut",
    "copies-not-synced": "power cut",
    "no-lock": "two processes",
    "no-checksums": "bit in a shard",
    "ledger-without-checks": "bit in the ledger",
    "ledger-first": "power cut",
    "no-finite-check": "NaN in weights",
}
"""Break -> a kind of fault that finds it."""
