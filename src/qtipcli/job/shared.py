"""Owns the run directory of several processes: the first writes, under the lock; all read, and see a commit when it returns."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtipcli.errors import PeerError, SettingsError
from qtipcli.job.directory import RunDirectory
from qtipcli.job.processes import ALONE, Processes
from qtipcli.job.record import differences, normalized

VISIBLE_S = 70.0
"""How long another machine may go without seeing a new file: NFS remembers for up to a minute what was not there (nfs(5))."""


class SharedDirectory(RunDirectory):
    """A RunDirectory that every process of a job has open. `commit`, `meet` and `forget` are collective."""

    _processes = ALONE

    @classmethod
    def join(
        cls,
        processes: Processes,
        path: Path,
        stage: str,
        settings: Mapping[str, Any],
        fingerprint: Mapping[str, Any],
        force: bool = False,
    ) -> SharedDirectory:
        """Open the job in the first process, as RunDirectory.open does, and then for reading in the others.

        Raises SettingsError where the processes were given different things, and what RunDirectory.open raises.
        """
        asked = {"stage": stage, "settings": normalized(settings), "fingerprint": normalized(fingerprint)}
        _refuse_different(processes, asked | {"machine": _machine()})
        with processes.main_first():
            opened = cls.open(path, stage, settings, fingerprint, force) if processes.is_main else _loaded(cls, path, stage)
        opened._processes = processes
        processes.barrier()  # or the first could finish something before others have read what is done
        return opened

    def commit(
        self,
        key: str,
        tensors: Mapping[str, Tensor],
        report: Mapping[str, Any] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """As RunDirectory.commit. Only the first process's tensors and report count."""
        if self._processes.is_main:
            super().commit(key, tensors, report, metadata)
        self.meet()

    def commit_unseen(self, key: str, tensors: Mapping[str, Tensor], report: Mapping[str, Any] | None = None) -> None:
        """As RunDirectory.commit, in the first process alone: the others go on, and see it when all call `meet`."""
        super().commit(key, tensors, report)

    def forget(self, *keys: str) -> None:
        """As RunDirectory.forget."""
        if self._processes.is_main:
            super().forget(*keys)
        self.meet()

    def meet(self) -> None:
        """Wait for all, and see what the first process has finished."""
        self._processes.barrier()
        if not self._processes.is_main:
            self.refresh()
        self._processes.barrier()  # or the first could write the ledger while others read it


def _loaded(kind: type[SharedDirectory], path: Path, stage: str) -> SharedDirectory:
    deadline = time.monotonic() + VISIBLE_S
    while not (found := (path / "job.json").is_file()) and time.monotonic() < deadline:
        time.sleep(0.1)
    if not found:
        raise SettingsError(
            f"{path}, which the first process has just opened, is not there for another one",
            "all processes work in one directory: put it on a file system that all machines share, under the same path",
        )
    return kind.load(path, stage)


def _machine() -> dict[str, Any]:
    """What decides the bits of sums besides the job: processes that differ in it would not hold the same tensors."""
    is_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if is_gpu else torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def _refuse_different(processes: Processes, asked: dict[str, Any]) -> None:
    """Before anything is written: machines of one job may hold different models or texts under the same names."""
    found = list(differences(processes.broadcast(asked), asked))
    if not any(processes.sum_numbers(len(found))):
        return
    if not found:
        raise PeerError("another process was given something else, and says what")
    raise SettingsError(
        f"process {processes.rank} was given something else than the first one: {found[0]}",
        "give every process the same model, text, settings and OMP_NUM_THREADS, on machines of one kind",
    )
