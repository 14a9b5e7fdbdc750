"""What the file system refuses becomes one sentence with a remedy, nothing stays half-written, and the job goes on later."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

from job.tiny import KEYS, do_job, exit_status, fork, open_run, snapshot
from qtipcli.errors import StorageError, storage_error

_CLONE_NEWNS, _MS_REC, _MS_PRIVATE = 0x00020000, 0x4000, 1 << 18


def mount_small_disk(path: Path, size: int) -> bool:
    """A tmpfs of `size` bytes on `path`, seen by this process only; False where that is not permitted."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) or libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None):
        return False
    return libc.mount(b"none", os.fsencode(path), b"tmpfs", 0, f"size={size}".encode()) == 0


def test_a_full_disk_ends_in_words_and_the_job_goes_on_when_there_is_space(tmp_path: Path) -> None:
    do_job(tmp_path / "oracle")
    oracle = snapshot(tmp_path / "oracle")
    disk = tmp_path / "disk"
    disk.mkdir()
    not_permitted = 77

    def work() -> None:
        if not mount_small_disk(disk, 64 * 1024):
            os._exit(not_permitted)
        do_job(disk / "job", KEYS[:1])
        (disk / "filler").write_bytes(b"x" * shutil.disk_usage(disk).free)
        before = snapshot(disk / "job")
        with pytest.raises(StorageError, match=r"cannot write .+: the disk is full"):
            do_job(disk / "job")
        assert snapshot(disk / "job") == before
        with pytest.raises(StorageError, match="the disk is full"):
            do_job(disk / "new")  # cannot even be begun
        assert not (disk / "new").exists()
        (disk / "filler").unlink()
        assert do_job(disk / "job") == list(KEYS[1:])
        assert snapshot(disk / "job") == oracle

    status = exit_status(fork(work))
    if status == not_permitted:
        pytest.skip("mounting a small disk is not permitted here")
    assert status == 0


def test_a_write_that_fails_half_way_leaves_nothing_and_the_job_goes_on_in_the_same_process(tmp_path: Path) -> None:
    def work() -> None:
        # The kernel refuses, half-way, a write beyond 4000 bytes of any file, pytest's log too: so not in its process.
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        with open_run(tmp_path) as run:
            run.commit(KEYS[0], {"x": torch.ones(10)})
            before = snapshot(tmp_path)
            with pytest.raises(
                StorageError, match=r"block-00001\.safetensors: larger than the file system or ulimit -f allows"
            ):
                run.commit(KEYS[1], {"x": torch.ones(2000)})
            assert snapshot(tmp_path) == before
            assert run.keys() == [KEYS[0]]
            run.commit(KEYS[1], {"x": torch.ones(10)})

    assert exit_status(fork(work)) == 0
    assert do_job(tmp_path) == [KEYS[2]]


def test_a_disk_that_is_full_for_the_ledger_only_leaves_the_shard_to_be_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    do_job(tmp_path / "oracle")
    original = os.fsync

    def fsync(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").readlink().name == "ledger.jsonl":
            raise OSError(errno.ENOSPC, "No space left on device")
        original(descriptor)

    with monkeypatch.context() as patch, pytest.raises(StorageError, match=r"ledger\.jsonl: the disk is full"):
        patch.setattr(os, "fsync", fsync)
        do_job(tmp_path / "job")
    assert do_job(tmp_path / "job") == list(KEYS)
    assert snapshot(tmp_path / "job") == snapshot(tmp_path / "oracle")


def test_a_commit_whose_ledger_line_failed_may_be_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_run(tmp_path) as run:

        def fail(*arguments: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(run._ledger, "append", fail)
            run.commit(KEYS[0], {"x": torch.ones(3)})
        run.commit(KEYS[0], {"x": torch.ones(3)})
        assert torch.equal(run.read(KEYS[0])["x"], torch.ones(3))


def test_a_directory_without_write_permission_is_named(tmp_path: Path) -> None:
    # Below /tmp itself: pytest's own directories are closed to other users, and root, who may do anything, becomes one here.
    shared = Path(tempfile.mkdtemp())
    try:
        do_job(shared / "job", KEYS[:1])
        before = snapshot(shared / "job")
        for path in (shared / "job", shared):
            path.chmod(0o555)

        def work() -> None:
            if os.getuid() == 0:
                os.setuid(65534)
            with pytest.raises(StorageError, match=f"cannot write {shared}/job/lock: no permission"):
                do_job(shared / "job")
            with pytest.raises(StorageError, match=f"cannot write {shared}/new: no permission") as caught:
                do_job(shared / "new")
            assert "choose another directory" in caught.value.hint

        assert exit_status(fork(work)) == 0
        for path in (shared / "job", shared):
            path.chmod(0o755)
        assert snapshot(shared / "job") == before
    finally:
        shutil.rmtree(shared)


@pytest.mark.parametrize("number", ["EROFS", "EDQUOT", "EACCES", "EPERM", "ENOENT", "ENOTDIR", "ENAMETOOLONG", "EMFILE", "EIO"])
def test_every_refusal_names_the_path_and_a_remedy(number: str) -> None:
    code = getattr(errno, number)
    error = storage_error(OSError(code, os.strerror(code)), "/data/{run}/ACTION", "read")
    assert "/data/{run}/ACTION" in error.message and error.hint
    assert storage_error(OSError(9999, "strange {thing}"), "/data").message == "cannot write /data: strange {thing}"
