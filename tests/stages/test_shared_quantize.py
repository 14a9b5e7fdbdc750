"""`qtip calibrate` and `qtip quantize` as several processes: real gloo groups of tiny models, most in forks (stages.ranks).

Oracle: one process. Tolerance: none, to the last byte of every shard, ledger and packed file.
"""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stages.families import save
from stages.fixtures import Qtip
from stages.hosts import two_hosts
from stages.ranks import Ended, Ranks
from stages.test_processes import GONE, run
from stages.tiny import snapshot

SHARED_TILES = {"qtipcli.stages.shared_encoder.LEAST_WORK": {"cpu": 0}}
"""Patches after which even these tiny matrices' tiles are shared."""

OPTIONS: dict[str, tuple[object, ...]] = {
    "llama": ("--embedding-bits", "4"),
    "llama one-sided": ("--one-sided", "--original-prefix"),
    "mixture": (),
    "mixture original": ("--original-prefix",),
    "llama allocated": ("--bits", "2.5", "--windows", "2", "--one-sided"),
}
"""Two-sided unless it says otherwise; the llama's embedding is tied to its head."""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with Ranks(tmp_path_factory.mktemp("ranks")) as started:
        # More experts than processes: each then rounds some alone.
        save("Qwen3-MoE", started.folder / "mixture", {"num_experts": 6, "num_local_experts": 6})
        yield started


def text(ranks: Ranks) -> list[object]:
    return ["--data", ranks.folder / "text.txt", "--samples", "18", "--context", "24"]


def quantize(ranks: Ranks, case: str) -> list[object]:
    model = "mixture" if case.startswith("mixture") else "model"
    names = ("--out", "out", "--hessians", "hessians", "--state-bits", "8")
    return ["quantize", ranks.folder / model, *names, *text(ranks), *OPTIONS[case]]


def shared(ranks: Ranks, world: int, where: Path, *arguments: object, **request: Any) -> Ended:
    return ranks(world, where, *arguments, patches=SHARED_TILES, **request)


def finished(where: Path) -> dict[str, str]:
    """Digests of all files but those that hold the time at which a job was started."""
    return {name: digest for name, digest in snapshot(where).items() if not name.endswith("job.json")}


@pytest.fixture(scope="module")
def one(ranks: Ranks) -> Callable[[str], dict[str, str]]:
    """What one process makes of a case."""

    @functools.cache
    def made(case: str) -> dict[str, str]:
        where = ranks.folder / f"one {case}"
        ended = ranks(1, where, *quantize(ranks, case))
        assert ended.statuses == [0], ended.err
        return finished(where)

    return made


@pytest.mark.parametrize(
    ("case", "world"),
    [
        *(("llama", 2), ("llama", 4), ("llama one-sided", 2), ("mixture", 2), ("mixture", 4)),
        *(("mixture original", 4), ("llama allocated", 2)),
    ],
)
def test_the_bytes_are_those_of_one_process(case: str, world: int, ranks: Ranks, one: Any, tmp_path: Path) -> None:
    ended = shared(ranks, world, tmp_path / "job", *quantize(ranks, case))
    assert ended.statuses == [0] * world, ended.err
    assert finished(tmp_path / "job") == one(case)
    assert [bool(out) for out in ended.out] == [True] + [False] * (world - 1)
    assert ended.said("calibrate\n") == 1


def test_processes_beyond_the_slices_have_no_text_and_change_nothing(ranks: Ranks, tmp_path: Path) -> None:
    """The number of slices is the job's, and quantize takes it from the calibration."""
    for world, name in ((1, "one"), (3, "three")):
        calibrate = ("calibrate", ranks.folder / "model", "--out", "hessians", *text(ranks), "--slices", "2")
        first = shared(ranks, world, tmp_path / name, *calibrate)
        assert first.statuses == [0] * world, first.err
        second = shared(ranks, world, tmp_path / name, *quantize(ranks, "llama"))
        assert second.statuses == [0] * world, second.err
    for ended in (first, second):
        assert ended.said("1 of 3 processes have no text: it is cut into 2 slices"), ended.err
    assert finished(tmp_path / "three") == finished(tmp_path / "one")


@pytest.mark.parametrize(
    ("case", "victim", "pattern"),
    [
        ("llama", 0, "hessians/outputs-00001.safetensors"),
        ("mixture", 1, "out.job/block-00000.safetensors"),
        ("mixture original", 0, "out.job/block-00000.safetensors"),
    ],
)
def test_a_killed_process_ends_all_and_any_number_complete_the_job(
    case: str, victim: int, pattern: str, ranks: Ranks, one: Any, tmp_path: Path
) -> None:
    where = tmp_path / "job"
    ended = shared(ranks, 2, where, *quantize(ranks, case), signal=[victim, signal.SIGKILL, pattern])
    assert ended.statuses == [-signal.SIGKILL, 1] if victim == 0 else [1, -signal.SIGKILL], ended.err
    assert ended.said(GONE) == 1, ended.err
    assert ended.last_s is not None
    assert ended.last_s < 20
    again = shared(ranks, 3, where, *quantize(ranks, case))
    assert again.statuses == [0, 0, 0], again.err
    assert again.said("done before") + again.said("the Hessians in hessians are used") >= 1
    assert finished(where) == one(case)


@pytest.mark.parametrize(
    ("case", "pattern"), [("mixture", "hessians/block-00000.safetensors"), ("mixture", "out.job/block-00000.safetensors")]
)
def test_ctrl_c_to_one_stops_all_with_one_message(case: str, pattern: str, ranks: Ranks, one: Any, tmp_path: Path) -> None:
    where = tmp_path / "job"
    ended = shared(ranks, 2, where, *quantize(ranks, case), signal=[1, signal.SIGINT, pattern])
    assert ended.statuses == [130, 130], ended.err
    assert ended.said("stopped by Ctrl-C") == 1, ended.err
    assert not ended.said(GONE)
    again = shared(ranks, 1, where, *quantize(ranks, case))
    assert again.statuses == [0], again.err
    assert finished(where) == one(case)


def test_block_tuning_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    ended = ranks(2, tmp_path / "job", *quantize(ranks, "llama"), "--tune-blocks")
    assert ended.statuses == [2, 2], ended.err
    assert ended.said("--tune-blocks adds gradients in an order that depends on the number of processes") == 1, ended.err
    assert not list((tmp_path / "job").glob("*"))


def test_a_dry_run_is_for_one_process(qtip: Qtip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    outcome = qtip("quantize", "model", "--dry-run")
    assert outcome.status == 2
    assert "qtip quantize --dry-run was started as 2 processes" in outcome.err


def test_machines_that_share_no_file_system_are_refused(ranks: Ranks, tmp_path: Path) -> None:
    """The second process looks into a directory of its own, as if on another machine."""
    job = tmp_path / "job"
    patches = SHARED_TILES | {"qtipcli.job.shared.VISIBLE_S": 0.1}
    calibrate = ("calibrate", ranks.folder / "model", "--out", "hessians", *text(ranks))
    ended = ranks(2, job, *calibrate, patches=patches, apart=True)
    assert ended.statuses == [1, 2], ended.err
    assert ended.said("on a file system that all machines share") == 1, ended.err


def test_hessians_that_only_one_machine_has_are_refused(ranks: Ranks, tmp_path: Path) -> None:
    job = tmp_path / "job"
    made = ranks(1, job / "0", "calibrate", ranks.folder / "model", "--out", "hessians", *text(ranks))
    assert made.statuses == [0], made.err
    ended = ranks(2, job, *quantize(ranks, "llama one-sided"), apart=True)
    assert ended.statuses == [1, 2], ended.err
    assert ended.said("hessians is there for the first process and not for another one") == 1, ended.err


def test_through_torchrun_without_accelerates_variable(ranks: Ranks, one: Any, tmp_path: Path) -> None:
    """Where no GPU is, torchrun alone must not give two lone first processes, which accelerate's own default would."""
    command = ("--nproc_per_node", "2", "-m", "qtipcli", *quantize(ranks, "mixture original"))
    started, _ = run("torchrun", *command, where=tmp_path, use_cpu=False)
    _, err = started.communicate(timeout=180)
    assert started.returncode == 0, err
    assert finished(tmp_path) == one("mixture original")


@pytest.mark.slow
def test_two_hosts_that_share_a_file_system(ranks: Ranks, one: Any, tmp_path: Path) -> None:
    """Each in a network namespace of its own, which reaches the other by one cable; two processes on each."""
    with two_hosts() as hosts:
        ends = hosts.torchrun(2, tmp_path, quantize(ranks, "mixture"))
    assert [status for status, _ in ends] == [0, 0], ends
    assert finished(tmp_path) == one("mixture")
