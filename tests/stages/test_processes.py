"""`qtip finetune` as several processes: real gloo groups of a tiny model, most in forks (stages.ranks), some through torchrun.

Oracle: one process. Two processes add the sums of two halves, and so does one that computes half of a step's windows at once:
there the bytes are equal. With three, sums are added in an order that one process does not have.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qtipcli.job.lock import Lock
from qtipcli.stages.load import default_device
from stages.fixtures import Qtip
from stages.ranks import Ranks
from stages.tiny import VOCABULARY, environment, snapshot

CONTEXT = 32
TEXT = ("--samples", "16", "--heldout", "4", "--context", CONTEXT, "--batch", "4")
BOTH = ("--blocks", "--end-to-end", "--end-epochs", "3", "--checkpoint-every", "4", "--out", "tuned")
GONE = "another process of this job has ended"


def at_once(rows: int) -> dict[str, int]:
    """Patches after which one process takes this many windows through the model at once."""
    bytes_ = 4 * CONTEXT * VOCABULARY * rows
    return {"qtipcli.stages.distill.LOGIT_BYTES": bytes_, "qtipcli.stages.tune_blocks.MICRO_TOKENS": CONTEXT * rows}


HALVES = at_once(2)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with Ranks(tmp_path_factory.mktemp("ranks")) as started:
        yield started


def command(ranks: Ranks, *arguments: object) -> list[object]:
    folder = ranks.folder
    return ["finetune", folder / "out", "--base", folder / "model", "--data", folder / "text.txt", *TEXT, *arguments]


@pytest.fixture(scope="module")
def one(ranks: Ranks) -> Path:
    """What one process makes of it, half of a step's windows at once; read only."""
    where = ranks.folder / "one"
    assert ranks(1, where, *command(ranks, *BOTH), patches=HALVES).statuses == [0]
    return where


def losses(where: Path) -> torch.Tensor:
    lines = [json.loads(line) for line in (where / "tuned.end.job" / "loss.jsonl").read_text().splitlines()]
    return torch.tensor([value for line in lines for name, value in line.items() if name != "step"], dtype=torch.float64)


def test_two_processes_are_one_that_takes_half_the_windows_at_once(ranks: Ranks, one: Path, tmp_path: Path) -> None:
    """The same sums of two numbers: equal bits. Two processes meet these bits again below, through torchrun."""
    ended = ranks(2, tmp_path / "two", *command(ranks, *BOTH))
    assert ended.statuses == [0, 0], ended.err
    assert snapshot(tmp_path / "two" / "tuned") == snapshot(one / "tuned")
    assert torch.equal(losses(tmp_path / "two"), losses(one))
    assert ended.said("tune end to end\n") == 1
    assert [bool(out) for out in ended.out] == [True, False]
    left = {file.name for file in (tmp_path / "two" / "tuned.end.job").iterdir()}
    assert left == {"job.json", "ledger.jsonl", "loss.jsonl", "loss.png", "result.safetensors"}


def test_each_process_keeps_its_activations_in_a_file_of_its_own(ranks: Ranks, one: Path, tmp_path: Path) -> None:
    ended = ranks(2, tmp_path / "job", *command(ranks, "--blocks", "--out", "tuned", "--memory", "0"))
    assert ended.statuses == [0, 0], ended.err
    assert ended.said("go to a file") == 2  # the blocks' streams, and the teacher's of the verdict
    ledgers = [(where / "tuned.blocks.job" / "ledger.jsonl").read_text() for where in (one, tmp_path / "job")]
    assert ledgers[0] == ledgers[1]  # checksums and held-out losses of both blocks, and the verdict


def test_three_processes_differ_from_one_as_much_as_its_own_pieces_do(ranks: Ranks, one: Path, tmp_path: Path) -> None:
    """Three take 1, 1 and 2 of the four windows. The measure of what another order of sums may do is one process: halves
    against one and against four windows at once. Twice the larger of these, because two such differences may add up. float16
    may round to the next number."""
    for rows in (1, 4):
        assert ranks(1, tmp_path / f"by {rows}", *command(ranks, *BOTH), patches=at_once(rows)).statuses == [0]
    ended = ranks(3, tmp_path / "three", *command(ranks, *BOTH))
    assert ended.statuses == [0, 0, 0], ended.err
    assert ended.said("do not divide evenly") == 1
    *own, found = ((losses(tmp_path / name) - losses(one)).square().mean().sqrt() for name in ("by 1", "by 4", "three"))
    assert 0 < found <= 2 * max(own), (found, own)
    three, whole = (load_file(where / "tuned" / "model.safetensors") for where in (tmp_path / "three", one))
    for name, tensor in three.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, whole[name], rtol=torch.finfo(torch.float16).eps, atol=0)
        else:
            assert torch.equal(tensor, whole[name])


def test_stopped_and_killed_it_goes_on_with_any_number_of_processes(ranks: Ranks, one: Path, tmp_path: Path) -> None:
    """Ctrl-C comes to the second of two processes, SIGKILL to the one that went on, and two finish: the bytes of one."""
    where = tmp_path / "job"
    stopped = ranks(2, where, *command(ranks, *BOTH), signal=[1, signal.SIGINT, "tuned.blocks.job/block-00000.safetensors"])
    assert stopped.statuses == [130, 130], stopped.err
    assert stopped.said("stopped by Ctrl-C") == 1
    # The curve is drawn after the state's ledger line is written, without which there is no state.
    killed = ranks(1, where, *command(ranks, *BOTH), patches=HALVES, signal=[0, signal.SIGKILL, "tuned.end.job/loss.jsonl"])
    assert killed.statuses == [-signal.SIGKILL]
    assert "1 of 2 done before" in killed.err[0] or "2 of 2 done before" in killed.err[0]
    ended = ranks(2, where, *command(ranks, *BOTH))
    assert ended.statuses == [0, 0], ended.err
    assert "of 12 done before" in ended.err[0]
    assert snapshot(where / "tuned") == snapshot(one / "tuned")


def test_ctrl_c_to_one_stops_both_with_one_state_saved(ranks: Ranks, tmp_path: Path) -> None:
    endless = ("--end-to-end", "--end-epochs", "2000", "--checkpoint-every", "5", "--out", "tuned")
    ended = ranks(2, tmp_path / "job", *command(ranks, *endless), signal=[1, signal.SIGINT, "tuned.end.job/step-*.safetensors"])
    assert ended.statuses == [130, 130], ended.err
    assert ended.said("stopped by Ctrl-C") == 1
    assert len(list((tmp_path / "job" / "tuned.end.job").glob("step-*.safetensors"))) == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_other_with_one_message(rank: int, ranks: Ranks, tmp_path: Path) -> None:
    endless = ("--end-to-end", "--end-epochs", "2000", "--out", "tuned")
    ended = ranks(2, tmp_path / "job", *command(ranks, *endless), signal=[rank, signal.SIGKILL, "tuned.end.job/job.json"])
    assert ended.statuses == [-signal.SIGKILL, 1] if rank == 0 else [1, -signal.SIGKILL]
    assert ended.said(GONE) == 1, ended.err
    assert ended.last_s is not None
    assert ended.last_s < 20


def test_what_the_first_process_alone_finds_ends_both_with_its_message(ranks: Ranks, tmp_path: Path) -> None:
    """The lock is taken: only the process that writes asks for it."""
    (tmp_path / "job" / "tuned.end.job").mkdir(parents=True)
    lock = Lock(tmp_path / "job" / "tuned.end.job" / "lock")
    ended = ranks(2, tmp_path / "job", *command(ranks, "--end-to-end", "--out", "tuned"))
    lock.release()
    assert ended.statuses == [1, 1]
    assert ended.said("another qtip") == 1
    assert not ended.said(GONE)


def test_processes_without_work_are_refused(ranks: Ranks, tmp_path: Path) -> None:
    ended = ranks(3, tmp_path / "job", *command(ranks, "--end-to-end", "--batch", "2", "--out", "tuned"))
    assert ended.statuses == [2, 2, 2]
    assert ended.said("2 windows in a step leave some of 3 processes idle") == 1
    assert not list((tmp_path / "job").iterdir())


def run(launcher: str, *arguments: object, where: Path, use_cpu: bool = True) -> tuple[subprocess.Popen[str], list[str]]:
    """Start a launcher of the environment that runs the tests. use_cpu: tell accelerate that there is no GPU."""
    line = [str(Path(sys.executable).parent / launcher), *map(str, arguments)]
    surroundings = environment() | ({"ACCELERATE_USE_CPU": "true"} if use_cpu else {})
    pipe = subprocess.PIPE
    return subprocess.Popen(line, cwd=where, env=surroundings, stdout=pipe, stderr=pipe, text=True), line


def child_with_rank(launcher: int, rank: int) -> int | None:
    """The pid of the process that the launcher started under this number."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            is_child = int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == launcher
            if is_child and f"RANK={rank}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                return int(entry.name)
        except (OSError, ValueError):
            continue
    return None


def test_through_torchrun_a_killed_process_ends_all_and_the_same_command_completes(
    ranks: Ranks, one: Path, tmp_path: Path
) -> None:
    arguments = ("--nproc_per_node", "2", "-m", "qtipcli", *command(ranks, *BOTH))
    started, _ = run("torchrun", *arguments, where=tmp_path)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("tuned.blocks.job/block-*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.005)
    victim = child_with_rank(started.pid, 1)
    assert victim is not None
    os.kill(victim, signal.SIGKILL)
    killed = time.monotonic()
    _, err = started.communicate(timeout=60)
    assert time.monotonic() - killed < 30
    assert started.returncode not in (0, None)
    assert err.count(GONE) == 1, err
    assert child_with_rank(started.pid, 0) is None
    assert not (tmp_path / "tuned").exists()
    again, _ = run("torchrun", *arguments, where=tmp_path)
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert out.count("held-out KL") == 1
    assert snapshot(tmp_path / "tuned") == snapshot(one / "tuned")


def test_other_commands_are_refused_once_and_before_anything_is_written(tmp_path: Path) -> None:
    started, _ = run(
        "torchrun", "--nproc_per_node", "2", "-m", "qtipcli", "pack", "model", "job", "--out", "out", where=tmp_path
    )
    _, err = started.communicate(timeout=60)
    assert started.returncode != 0
    assert err.count("only calibrate, quantize, finetune run on several") == 1, err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["pack", "eval", "generate", "inspect", "doctor", "demo", "bench"])
def test_no_other_command_runs_on_several(name: str, qtip: Qtip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    outcome = qtip(name, "some", "thing", *(["--out", "out"] if name == "pack" else []))
    assert outcome.status == 2
    assert f"qtip {name} was started as 2 processes" in outcome.err


@pytest.mark.parametrize("command", [("finetune", "out", "--end-to-end"), ("calibrate", "model"), ("quantize", "model")])
def test_accelerate_that_starts_one_process_for_several_is_refused(command: tuple[str, ...], tmp_path: Path) -> None:
    """`accelerate launch --cpu --num_processes 2` says nothing of it by itself."""
    line = ("launch", "--cpu", "--num_processes", "2", "-m", "qtipcli", *command)
    started, _ = run("accelerate", *line, where=tmp_path)
    _, err = started.communicate(timeout=60)
    assert started.returncode != 0
    assert err.count("was asked for several processes and started one") == 1, err
    assert not list(tmp_path.iterdir())


def test_each_process_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert default_device() == torch.device("cuda")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert default_device() == torch.device("cuda:3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert default_device() == torch.device("cpu")
