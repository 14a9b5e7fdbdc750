"""A job of a few small shards, and what the tests do with it: run it here or in its own process, and compare the result."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from qtipcli.job.directory import RunDirectory
from qtipcli.job.interrupt import checkpoint, interruptible

SETTINGS = {"bits": 2, "data": {"samples": 128, "name": "code"}, "ratio": 0.1}
FINGERPRINT = {"model": {"model.safetensors": {"bytes": 10, "sha256": "00"}}}
KEYS = ("block-00000", "block-00001", "block-00002")

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def tensors_of(key: str) -> dict[str, torch.Tensor]:
    """What the job computes for `key`: a function of the key only."""
    start = int(key[-5:])
    return {"weight": torch.arange(start, start + 600, dtype=torch.int32).view(20, 30), "scale": torch.full((7,), start + 0.5)}


def report_of(key: str) -> dict[str, object]:
    return {"loss": int(key[-5:]) / 3, "shape": [20, 30]}


def open_run(path: Path, **changes: object) -> RunDirectory:
    asked = {"stage": "calibrate", "settings": SETTINGS, "fingerprint": FINGERPRINT} | changes
    return RunDirectory.open(path, **asked)


def do_job(path: Path, keys: tuple[str, ...] = KEYS, **changes: object) -> list[str]:
    """Run the job, or go on with it; returns the keys that were done in this call."""
    did = []
    with interruptible(), open_run(path, **changes) as run:
        for key in keys:
            if not run.done(key):
                run.commit(key, tensors_of(key), report_of(key))
                did.append(key)
            checkpoint()
    return did


def snapshot(path: Path) -> dict[str, object]:
    """Every file of the directory with its bytes; job.json without the time of its creation, and the checksum of that."""
    content: dict[str, object] = {file.name: file.read_bytes() for file in path.iterdir()}
    if "job.json" in content:
        job = json.loads(content["job.json"])
        content["job.json"] = {name: value for name, value in job.items() if name not in ("created", "check")}
    return content


def names(path: Path) -> set[str]:
    return {file.name for file in path.iterdir()}


def fork(work: Callable[[], object], stderr: int | None = None) -> int:
    """Run `work` in a child (a fork: torch is loaded already) and return its pid; it exits with 0, or 1 if it raised."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        die_with_parent()  # a test that fails leaves no process behind
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if stderr is not None:
            os.dup2(stderr, 2)
            sys.stderr = sys.__stderr__
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)  # before pytest notices that there are two of it


def die_with_parent() -> None:
    """End this process when the one that forked it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def exit_status(pid: int) -> int:
    """Wait for the child; its exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
