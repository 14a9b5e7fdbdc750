"""A few faults of each kind end in the same bytes or in a clear refusal; and the harness finds a product that is broken.

Oracle: an undisturbed run of the same command, to the byte. In a process of its own, which forks and mounts small disks.
"""

from __future__ import annotations

import json
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest
from job.tiny import exit_status, fork
from stages.tiny import environment

from faults import breaks, kinds
from faults.disk_model import Disk
from faults.judge import FAILED
from faults.recorder import Recorder
from qtipcli.job.files import make_directory

QUICK = 2 * len(kinds.KINDS)


def harness(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "faults", "--jobs", "2", "--quick", *map(str, arguments)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)


def test_two_faults_of_each_kind_end_in_the_same_bytes_or_in_a_clear_refusal(tmp_path: Path) -> None:
    done = harness("--count", QUICK, "--json", tmp_path / "faults.json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "faults.json").read_text())
    assert report["tried"] == QUICK
    assert report["kinds"].keys() == kinds.KINDS.keys()
    assert FAILED not in report["outcomes"]


@pytest.mark.slow
@pytest.mark.parametrize("broken", breaks.FOUND_BY)
def test_the_harness_finds_a_product_that_is_broken(broken: str) -> None:
    done = harness("--count", 12, "--kinds", breaks.FOUND_BY[broken], "--break", broken)
    assert done.returncode == 1, done.stdout + done.stderr
    assert FAILED in done.stdout


def test_a_directory_and_its_parents_survive_a_power_cut_once_they_are_made(tmp_path: Path) -> None:
    record = tmp_path / "record"

    def work() -> None:
        recorder = Recorder(tmp_path / "root", record)
        recorder.install()
        make_directory(tmp_path / "root" / "a" / "b")
        recorder.write()

    (tmp_path / "root").mkdir()
    assert exit_status(fork(work)) == 0
    disk = Disk({})
    for op in pickle.loads(record.read_bytes()):
        disk.do(op)
    assert left(disk, "none", "lost") == {"a": None, "a/b": None}


def left(disk: Disk, names: str, content: str) -> dict[str, bytes | None]:
    tree = disk.left(names, content, random.Random(0))
    return {"/".join(path): held for path, held in tree.items()}


def test_a_disk_keeps_what_was_synced_and_may_lose_all_else() -> None:
    disk = Disk({("old",): b"before"})
    disk.do(("create", ("new",)))
    disk.do(("write", ("new",), 0, b"12345678"))
    assert left(disk, "none", "kept") == {"old": b"before"}, "the directory was not synced"
    assert left(disk, "all", "lost") == {"old": b"before", "new": b""}, "the file was not synced"
    assert left(disk, "all", "zeros") == {"old": b"before", "new": bytes(8)}
    disk.do(("sync", ("new",)))
    assert left(disk, "all", "lost") == {"old": b"before", "new": b"12345678"}
    assert left(disk, "none", "lost") == {"old": b"before"}
    disk.do(("rename", ("new",), ("old",)))
    assert left(disk, "none", "lost") == {"old": b"before"}
    assert left(disk, "all", "lost") == {"old": b"12345678"}
    disk.do(("sync", ()))
    disk.do(("unlink", ("old",)))
    assert left(disk, "none", "lost") == {"old": b"12345678"}
    assert left(disk, "all", "lost") == {}


def test_a_file_that_grew_after_its_sync_may_end_anywhere_behind_it() -> None:
    disk = Disk({("file",): b"abcd"})
    disk.do(("write", ("file",), 4, b"efgh"))
    found = {disk.left("all", "torn", random.Random(seed))["file",] for seed in range(100)}
    assert found == {b"abcdefgh"[:length] for length in range(4, 9)}
