"""Processes that share a job: what they add up, who speaks, when they stop. Real gloo groups in forks.

Oracle: plain sums of small integers, so that no order of sums matters. Tolerance: none.
"""

from __future__ import annotations

import datetime
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from torch import nn

from job.tiny import FINGERPRINT, SETTINGS, exit_status, fork
from qtipcli.errors import MismatchError, PeerError, QtipError, SettingsError, StoppedError
from qtipcli.job import launcher, processes
from qtipcli.job.interrupt import interruptible
from qtipcli.job.processes import ALONE, Processes, together
from qtipcli.job.shared import SharedDirectory


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def say_rank(rank: int, world: int, port: int) -> None:
    numbers = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({name: str(number) for name, number in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"})


def in_each(world: int, work: Callable[[int], object]) -> list[int]:
    """Run `work(rank)` in as many processes; their exit statuses, 0 where it did not raise."""
    port = free_port()

    def rank_of(rank: int) -> Callable[[], object]:
        def run() -> None:
            say_rank(rank, world, port)
            os.environ["OMP_NUM_THREADS"] = "1"
            work(rank)

        return run

    return [exit_status(pid) for pid in [fork(rank_of(rank)) for rank in range(world)]]


def test_sums_are_the_sums_in_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buckets of eight numbers: some tensors share one, one is larger than all."""
    monkeypatch.setattr(processes, "BUCKET_ELEMENTS", 8)
    kinds = [(3, torch.float32), (4, torch.float32), (5, torch.float64), (30, torch.float32), (2, torch.float32)]

    def work(rank: int) -> None:
        with together() as group:
            assert (group.rank, group.world, group.is_main) == (rank, 3, rank == 0)
            tensors = [torch.arange(size, dtype=dtype).view(1, -1) + rank for size, dtype in kinds]
            group.sum_(tensors)
            for tensor, (size, dtype) in zip(tensors, kinds, strict=True):
                assert torch.equal(tensor, 3 * torch.arange(size, dtype=dtype).view(1, -1) + 3)
            parameter, idle = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(3))
            if rank:
                parameter.grad = torch.full((2, 2), float(rank)).T
            group.sum_gradients([parameter, idle])
            assert torch.equal(parameter.grad, torch.full((2, 2), 3.0))
            assert torch.equal(idle.grad, torch.zeros(3))
            assert group.sum_numbers(rank, 1.5) == [3.0, 4.5]
            assert group.broadcast({"from": rank}) == {"from": 0}

    assert in_each(3, work) == [0, 0, 0]


def test_the_first_process_goes_first(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        with together() as group, group.main_first():
            if group.is_main:
                time.sleep(0.2)
                (tmp_path / "made").write_text("by the first")
            assert (tmp_path / "made").read_text() == "by the first"

    assert in_each(2, work) == [0, 0]


def test_all_stop_at_the_safe_point_at_which_one_was_asked_to() -> None:
    def work(rank: int) -> None:
        with together() as group:
            passed = []
            with pytest.raises(StoppedError, match="Ctrl-C") as stop, interruptible(notice=False):
                for step in range(6):
                    group.barrier()
                    if rank == 1 and step == 3:
                        os.kill(os.getpid(), signal.SIGINT)
                    group.checkpoint()
                    passed.append(step)
            assert stop.value.exit_code == 130
            assert passed == [0, 1, 2]

    assert in_each(2, work) == [0, 0]


def test_a_failure_is_said_by_the_process_that_had_it() -> None:
    def work(rank: int) -> None:
        with pytest.raises(QtipError) as failure, together() as group:
            if rank == 1:
                raise QtipError("the disk of the second is full", exit_code=5)
            group.barrier()
        if rank == 1:
            assert failure.value.message == "the disk of the second is full"
        else:
            assert isinstance(failure.value, PeerError)
            assert "has ended" in failure.value.__cause__.message

    assert in_each(2, work) == [0, 0]


def test_a_process_that_hangs_is_not_waited_for_longer_than_the_timeout() -> None:
    def work(rank: int) -> None:
        pid = 0
        started = time.monotonic()
        with pytest.raises(QtipError, match="does not answer"), together(datetime.timedelta(seconds=1)) as group:
            pid = int(group.sum_numbers(os.getpid() if rank else 0)[0])
            if rank:
                time.sleep(60)
            group.barrier()
        os.kill(pid, signal.SIGKILL)
        assert time.monotonic() - started < 30

    assert in_each(2, work) == [0, -signal.SIGKILL]


def test_a_group_can_be_joined_again() -> None:
    ports = [free_port(), free_port()]

    def work(rank: int) -> None:
        for port in ports:
            say_rank(rank, 2, port)
            with together() as group:
                assert group.sum_numbers(1.0) == [2.0]

    assert in_each(2, work) == [0, 0]


def test_without_a_launcher_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*launcher.WORLD_VARIABLES, "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with together() as group:
        assert group is ALONE
        group.barrier()
        group.checkpoint()
        kept = torch.ones(2)
        group.sum_([kept])
        assert torch.equal(kept, torch.ones(2))
        assert group.sum_numbers(2.0) == [2.0]
        assert group.broadcast("same") == "same"


def test_processes_that_accelerate_takes_for_lone_ones_are_refused(tmp_path: Path) -> None:
    """What torchrun without ACCELERATE_USE_CPU=true gives where no GPU is, if the state was made without `cpu`."""

    def work(rank: int) -> None:
        try:
            refused(rank)
        finally:
            (tmp_path / str(rank)).touch()
            # The first process serves the store that the other one may still be asking.
            deadline = time.monotonic() + 30
            while rank == 0 and not (tmp_path / "1").exists() and time.monotonic() < deadline:
                time.sleep(0.05)

    def refused(rank: int) -> None:
        assert PartialState().num_processes == 1
        with pytest.raises(SettingsError, match="2 processes were started, but accelerate's state has 1"), together():
            raise AssertionError

    assert in_each(2, work) == [0, 0]


def test_one_process_where_accelerate_was_asked_for_several_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*launcher.WORLD_VARIABLES, "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    launcher.refuse_lone()  # accelerate launch --num_processes 1
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(SettingsError, match="started one"):
        launcher.refuse_lone()
    monkeypatch.setenv("PMI_SIZE", "2")
    launcher.refuse_lone()  # through mpirun
    assert launcher.world() == 2


def test_two_processes_do_not_share_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SettingsError, match="process 2 of this machine sees 1 GPUs"), together():
        raise AssertionError


def test_one_writes_and_all_read(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        with together() as group, SharedDirectory.join(group, tmp_path / "job", "calibrate", SETTINGS, FINGERPRINT) as job:
            for key in ("first", "second"):
                assert not job.done(key)
                job.commit(key, {"rank": torch.tensor(rank)}, {"rank": rank})
                assert job.report(key) == {"rank": 0}
                assert job.read(key)["rank"] == 0
            job.forget("first")
            assert job.keys() == ["second"]

    assert in_each(2, work) == [0, 0]
    assert not (tmp_path / "job" / "lock").exists()


def test_none_sees_what_the_first_finished_before_all_had_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a slow one would take a step for done that the others take together."""
    load = SharedDirectory.load.__func__

    def slowly(*arguments: object) -> SharedDirectory:
        time.sleep(0.5)
        return load(SharedDirectory, *arguments)

    def work(rank: int) -> None:
        monkeypatch.setattr(SharedDirectory, "load", slowly)
        with together() as group, SharedDirectory.join(group, tmp_path / "job", "calibrate", SETTINGS, FINGERPRINT) as job:
            if not job.done("first"):
                job.commit("first", {})
            assert group.sum_numbers(1.0) == [2.0]

    assert in_each(2, work) == [0, 0]


def test_what_the_first_commits_alone_all_see_when_they_meet(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        with together() as group, SharedDirectory.join(group, tmp_path / "job", "calibrate", SETTINGS, FINGERPRINT) as job:
            if rank == 0:
                job.commit_unseen("first", {"rank": torch.tensor(rank)}, {"rank": rank})
            else:
                assert not job.done("first")
            job.meet()
            assert job.report("first") == {"rank": 0}

    assert in_each(2, work) == [0, 0]


def test_tensors_and_objects_travel() -> None:
    def work(rank: int) -> None:
        with together() as group:
            if rank == 1:
                sent = [group.send(torch.full((3,), float(number)), 0) for number in range(3)]
                for each in sent:
                    each.wait()
            elif rank == 0:
                for number in range(3):
                    received = torch.empty(3)
                    group.receive(received, 1)
                    assert torch.equal(received, torch.full((3,), float(number)))
            tensor = torch.full((2,), rank)
            assert [int(each[0]) for each in group.gather(tensor)] == [0, 1, 2]
            assert group.collect({"rank": rank}) == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
            group.broadcast_(tensor, 2)
            assert tensor.tolist() == [2, 2]

    assert in_each(3, work) == [0, 0, 0]


def test_a_stop_that_one_process_polls_stops_the_others_too(tmp_path: Path) -> None:
    """Also one that waits for a message of the process that has stopped: it says Ctrl-C, not that another is gone."""

    def work(rank: int) -> None:
        with together() as group:
            with pytest.raises(StoppedError, match="Ctrl-C") as stop, interruptible(notice=False):
                group.barrier()
                if rank == 1:
                    os.kill(os.getpid(), signal.SIGINT)
                    group.poll()
                elif rank == 2:
                    group.receive(torch.empty(1), 1)
                deadline = time.monotonic() + 10
                while time.monotonic() < deadline:
                    group.poll()
                    time.sleep(0.01)
                raise AssertionError("nobody stopped")
            assert stop.value.exit_code == 130
            if rank == 1:
                processes._leave()  # as an error that goes on does
            (tmp_path / str(rank)).touch()
            # The first process serves the store that the others may still be asking; a launcher keeps it itself.
            deadline = time.monotonic() + 30
            while rank == 0 and len(list(tmp_path.iterdir())) < 3 and time.monotonic() < deadline:
                time.sleep(0.01)

    assert in_each(3, work) == [0, 0, 0]


def test_another_job_in_the_directory_is_said_by_the_first_process(tmp_path: Path) -> None:
    SharedDirectory.join(ALONE, tmp_path / "job", "calibrate", SETTINGS, FINGERPRINT).close()

    def work(rank: int) -> None:
        with pytest.raises(MismatchError if rank == 0 else PeerError), together() as group:
            SharedDirectory.join(group, tmp_path / "job", "calibrate", SETTINGS | {"bits": 3}, FINGERPRINT)

    assert in_each(2, work) == [0, 0]


def test_processes_with_different_inputs_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        with pytest.raises(PeerError if rank == 0 else SettingsError) as failure, together() as group:
            SharedDirectory.join(group, tmp_path / "job", "calibrate", SETTINGS | {"bits": 2 + rank}, FINGERPRINT)
        assert rank == 0 or "settings.bits is 2 there and 3 here" in failure.value.message

    assert in_each(2, work) == [0, 0]
    assert not (tmp_path / "job").exists()


def test_processes_with_other_threads_are_refused(tmp_path: Path) -> None:
    """They add in another order."""

    def work(rank: int) -> None:
        with pytest.raises(PeerError if rank == 0 else SettingsError) as failure, together() as group:
            torch.set_num_threads(1 + rank)
            SharedDirectory.join(group, tmp_path / "job", "calibrate", SETTINGS, FINGERPRINT)
        assert rank == 0 or "machine.threads is 1 there and 2 here" in failure.value.message

    assert in_each(2, work) == [0, 0]
    assert not (tmp_path / "job").exists()


def test_one_alone_is_the_first() -> None:
    assert Processes().is_main
    assert Processes().is_alone
