"""Owns the faults of a disk: full, and read-only, from the start or all of a sudden.

Each is a tmpfs of its own, which only this process and its children see. Where mounting is not permitted, a full disk is a
limit on the size of files (RLIMIT_FSIZE: the kernel refuses a write half-way) and a read-only one is a directory without write
permission, which root does not mind: the JSON says which was used.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from job.test_storage import mount_small_disk

from faults.judge import FAILED, REFUSED, Fault, Verdict, is_orderly, judged, settle, told
from faults.runs import Ended
from faults.subjects import different, snapshot

_MS_RDONLY, _MS_REMOUNT, _MNT_DETACH = 1, 32, 2
_LARGE = 64 << 20
_PAGE = 4096


@functools.cache
def may_mount() -> bool:
    """Whether small disks can be mounted here; from then on in a mount namespace of this process's own."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        if not mount_small_disk(Path(folder), _PAGE):
            return False
        _libc().umount2(os.fsencode(folder), _MNT_DETACH)
    return True


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def small_disk(path: Path, size: int) -> Iterator[None]:
    """A tmpfs of `size` bytes on `path`, which is made."""
    path.mkdir()
    if _libc().mount(b"none", os.fsencode(path), b"tmpfs", 0, f"size={size}".encode()):
        raise OSError(ctypes.get_errno(), "mount", str(path))
    try:
        yield
    finally:
        _libc().umount2(os.fsencode(path), _MNT_DETACH)


def remount(path: Path, size: int, read_only: bool = False) -> bool:
    """Whether the kernel did it: it refuses read-only while a file is open for writing."""
    flags = _MS_REMOUNT | (_MS_RDONLY if read_only else 0)
    return _libc().mount(b"none", os.fsencode(path), b"tmpfs", flags, f"size={size}".encode()) == 0


def used(path: Path) -> int:
    return shutil.disk_usage(path).used


def full(fault: Fault) -> Verdict:
    """From a random byte on nothing more can be written; or another program fills the disk at a random moment."""
    if not may_mount():
        return _limited(fault)
    with small_disk(fault.where, _LARGE):
        fault.subject.prepare(fault.where)
        before = used(fault.where)
        filler = fault.where / "filler"
        if fault.dice.random() < 0.7:
            whole = sum(-(-path.stat().st_size // _PAGE) * _PAGE for path in fault.subject.oracle.rglob("*"))
            remount(fault.where, before + fault.dice.randrange(0, max(_PAGE, whole), _PAGE) + _PAGE)
            ended = fault.run()
        else:
            running = fault.start()
            time.sleep(fault.moment())
            with contextlib.suppress(OSError), filler.open("wb") as file:
                while True:
                    os.write(file.fileno(), bytes(1 << 20))
            ended = running.wait()
            filler.unlink()
        return _after_refusal(fault, ended, lambda: remount(fault.where, _LARGE))


def _limited(fault: Fault) -> Verdict:
    fault.subject.prepare(fault.where)
    most = fault.dice.randrange(200, 900_000)
    ended = fault.run(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)))
    return _after_refusal(fault, ended, lambda: None)


def read_only(fault: Fault) -> Verdict:
    """The file system under a new or half-done job, or all of a sudden."""
    if not may_mount():
        return _without_permission(fault)
    with small_disk(fault.where, _LARGE):
        fault.subject.prepare(fault.where)
        way = fault.dice.choice(("new", "half done", "sudden"))
        if way == "half done":
            running = fault.start()
            time.sleep(fault.moment())
            running.signal(signal.SIGKILL)
            running.wait()
        if way == "sudden":
            running = fault.start()
            time.sleep(fault.moment())
            for _ in range(200):
                if remount(fault.where, _LARGE, read_only=True):
                    break
                time.sleep(0.001)
            return _after_refusal(fault, running.wait(), lambda: remount(fault.where, _LARGE))
        before = snapshot(fault.where)
        remount(fault.where, _LARGE, read_only=True)
        ended = fault.run()
        if words := different(snapshot(fault.where), before):
            return Verdict(FAILED, f"a read-only file system was changed: {words}")
        if ended.status == 0 and before != fault.subject.expected:
            return Verdict(FAILED, f"done, on a read-only file system: {told(ended)}")
        return _after_refusal(fault, ended, lambda: remount(fault.where, _LARGE))


def _without_permission(fault: Fault) -> Verdict:
    fault.subject.prepare(fault.where)
    fault.where.chmod(0o555)
    return _after_refusal(fault, fault.run(), lambda: fault.where.chmod(0o755))


def half_written(where: Path) -> list[str]:
    """Names that only a file or directory in the making has."""
    return sorted(path.name for path in where.rglob("*") if path.name.endswith((".qtip-tmp", ".partial", ".replaced")))


def _after_refusal(fault: Fault, ended: Ended, remedy: Callable[[], object]) -> Verdict:
    """The command was to end in words, or done; with the cause gone, the same command ends in the same bytes."""
    if not is_orderly(ended):
        return Verdict(FAILED, told(ended))
    if not os.statvfs(fault.where).f_flag & os.ST_RDONLY and (half := half_written(fault.where)):
        return Verdict(FAILED, f"left half-written: {half}")
    remedy()
    if ended.status == 0 and judged(fault).outcome == FAILED:
        return Verdict(FAILED, f"done, but {judged(fault).said}")
    verdict = settle(fault)
    if verdict.outcome == FAILED or ended.status == 0:
        return verdict
    return Verdict(REFUSED, ended.message)
