"""Ctrl-C and SIGTERM: the first stops at a safe point, the second at once; the same command goes on either way.

Oracle: the same job, never interrupted. Tolerance: none, bytes.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from job.tiny import KEYS, do_job, exit_status, fork, open_run, report_of, snapshot, tensors_of
from qtipcli.errors import StoppedError
from qtipcli.job.interrupt import checkpoint, interruptible, stopping_in_words


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


@pytest.mark.parametrize(("number", "status", "name"), [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")])
def test_the_running_step_is_finished_and_the_same_command_goes_on(
    number: signal.Signals, status: int, name: str, tmp_path: Path, pipe: tuple[int, int]
) -> None:
    do_job(tmp_path / "oracle")

    def work() -> None:
        with interruptible(), open_run(tmp_path / "job") as run:
            try:
                for key in KEYS:
                    if key == KEYS[1]:
                        os.kill(os.getpid(), number)  # in the middle of the second step
                    run.commit(key, tensors_of(key), report_of(key))
                    checkpoint()
            except StoppedError as error:
                assert name in error.message and "same command" in error.hint
                os._exit(error.exit_code)

    assert exit_status(fork(work, stderr=pipe[1])) == status
    assert b"stopping after the step that is running" in os.read(pipe[0], 1000)
    assert do_job(tmp_path / "job") == [KEYS[2]]
    assert snapshot(tmp_path / "job") == snapshot(tmp_path / "oracle")


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path, pipe: tuple[int, int]) -> None:
    do_job(tmp_path, KEYS[:1])

    def work() -> None:
        with interruptible(), open_run(tmp_path):
            try:
                os.write(2, b"ready")
                time.sleep(60)  # a step without a safe point
            except KeyboardInterrupt:
                os._exit(3)

    start = time.perf_counter()
    pid = fork(work, stderr=pipe[1])
    assert os.read(pipe[0], 5) == b"ready"
    os.kill(pid, signal.SIGINT)
    os.read(pipe[0], 1000)  # the first has been answered
    os.kill(pid, signal.SIGINT)
    assert exit_status(pid) == 3
    assert time.perf_counter() - start < 30
    assert do_job(tmp_path) == list(KEYS[1:])


@pytest.mark.usefixtures("no_sync")
def test_a_ctrl_c_at_any_disk_operation_of_a_commit_loses_nothing(tmp_path: Path) -> None:
    do_job(tmp_path / "oracle")
    oracle = snapshot(tmp_path / "oracle")
    names = ("open", "write", "fsync", "replace", "ftruncate", "close")
    originals = {name: getattr(os, name) for name in names}
    for moment in range(60):
        calls = 0
        path = tmp_path / f"job-{moment}"

        def make(name: str, path: Path = path, moment: int = moment):
            def call(*arguments, **options):
                nonlocal calls
                result = originals[name](*arguments, **options)
                calls += 1
                if calls == moment + 1:
                    raise KeyboardInterrupt
                return result

            return call

        stopped = False
        try:
            for name in names:
                setattr(os, name, make(name))
            do_job(path)
        except KeyboardInterrupt:
            stopped = True
        finally:
            for name, original in originals.items():
                setattr(os, name, original)
        leftover = [file.name for file in path.iterdir() if file.name.endswith(".qtip-tmp")] if path.exists() else []
        assert leftover == []
        do_job(path)
        assert snapshot(path) == oracle, f"Ctrl-C at operation {moment}"
        if not stopped:
            break
    assert moment > 20, "the interrupts must cover the job"


def test_a_request_during_the_last_step_is_not_lost() -> None:
    with pytest.raises(StoppedError), interruptible():
        os.kill(os.getpid(), signal.SIGINT)


def test_nested_stages_stop_together_and_the_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    reached = []
    with pytest.raises(StoppedError), interruptible():
        with interruptible():
            os.kill(os.getpid(), signal.SIGTERM)
        reached.append("between the stages")
        checkpoint()
        reached.append("too far")
    assert reached == ["between the stages"]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    checkpoint()  # outside nothing is pending
    with interruptible():
        checkpoint()  # and a new job begins without the old request


@pytest.mark.parametrize("signals", [1, 2])
def test_an_error_that_native_code_makes_of_a_ctrl_c_is_put_into_words(signals: int) -> None:
    def native() -> None:
        try:
            for _ in range(signals):
                os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape") from None

    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(StoppedError, match="stopped by Ctrl-C; a job keeps what is finished"), stopping_in_words():
            if signals == 1:
                native()
            with interruptible(notice=False):
                native()
        with pytest.raises(ValueError, match="of its own"), stopping_in_words():
            raise ValueError("of its own")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_it_does_nothing() -> None:
    def work() -> None:
        with interruptible():
            checkpoint()
        done.append(True)

    done: list[bool] = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]
