"""A job that is killed anywhere and started again ends in the bytes of one that was never killed.

Oracle: the same job, run once without a disturbance. Tolerance: none, bytes.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from job.tiny import KEYS, SETTINGS, do_job, exit_status, fork, open_run, snapshot

CRASH_STATUS = 99
TWO_KEYS = KEYS[:2]  # one commit after another is all there is to see


def crash_at(number: int) -> None:
    """Make this process end, as under kill -9, at its `number`-th call that changes the disk; a write gets half-way."""
    calls = count()

    def dying(name: str) -> Callable[..., object]:
        original = getattr(os, name)

        def call(*arguments: object, **options: object) -> object:
            if next(calls) == number:
                if name == "write":
                    original(arguments[0], arguments[1][: len(arguments[1]) // 2])
                os._exit(CRASH_STATUS)
            return original(*arguments, **options)

        return call

    for name in ("open", "mkdir", "write", "pwrite", "ftruncate", "fsync", "replace", "unlink"):
        setattr(os, name, dying(name))


def prepare_nothing(path: Path) -> None:
    pass


def prepare_other_settings(path: Path) -> None:
    do_job(path, TWO_KEYS, settings=SETTINGS | {"bits": 3})


def prepare_damage(path: Path) -> None:
    do_job(path, TWO_KEYS)
    shard = path / f"{TWO_KEYS[-1]}.safetensors"  # the last: a shard that is done again comes last in the ledger
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)


@pytest.mark.usefixtures("no_sync")
@pytest.mark.parametrize("prepare", [prepare_nothing, prepare_other_settings, prepare_damage])
def test_a_crash_at_any_disk_operation_loses_nothing(prepare: Callable[[Path], None], tmp_path: Path) -> None:
    force = prepare is not prepare_nothing
    do_job(tmp_path / "oracle", TWO_KEYS)
    oracle = snapshot(tmp_path / "oracle")
    path = tmp_path / "job"
    for number in count():
        prepare(path)

        def work(number: int = number) -> None:
            crash_at(number)
            do_job(path, TWO_KEYS, force=force)

        status = exit_status(fork(work))
        do_job(path, TWO_KEYS, force=force)
        assert snapshot(path) == oracle, f"crash at disk operation {number}"
        shutil.rmtree(path)
        if status == 0:
            break
        assert status == CRASH_STATUS
    assert number > 20, "the crashes must cover the job"


@pytest.mark.usefixtures("no_sync")
def test_kill_9_at_random_moments_then_the_same_command_gives_the_same_bytes(tmp_path: Path) -> None:
    keys = tuple(f"block-{number:05d}" for number in range(30))
    start = time.perf_counter()
    assert exit_status(fork(lambda: do_job(tmp_path / "oracle", keys))) == 0
    seconds = time.perf_counter() - start
    oracle = snapshot(tmp_path / "oracle")
    dice = random.Random(0)
    path = tmp_path / "job"
    kills, kills_midway = 0, 0
    while kills < 25:
        pid = fork(lambda: do_job(path, keys))
        time.sleep(dice.uniform(0, seconds))
        os.kill(pid, signal.SIGKILL)
        status = exit_status(pid)
        if status == 0:
            assert snapshot(path) == oracle
            shutil.rmtree(path)
            seconds *= 0.9  # killed too late: the first run was slower than the others
            continue
        assert status == -signal.SIGKILL
        kills += 1
        kills_midway += path.exists() and snapshot(path) != oracle
    do_job(path, keys)
    assert snapshot(path) == oracle
    assert kills_midway >= 5, "the kills must hit the job at work"


def test_what_was_finished_before_a_kill_is_not_done_again(tmp_path: Path) -> None:
    def work() -> None:
        run = open_run(tmp_path / "job")
        run.commit(KEYS[0], {})
        os.kill(os.getpid(), signal.SIGKILL)

    assert exit_status(fork(work)) == -signal.SIGKILL
    assert do_job(tmp_path / "job") == list(KEYS[1:])
