"""The run directory: frozen settings, refusals that name what differs, damage that is named, files of others that survive."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
from pathlib import Path

import pytest
import safetensors.torch
import torch

from job.tiny import FINGERPRINT, KEYS, SETTINGS, do_job, exit_status, fork, names, open_run, report_of, snapshot, tensors_of
from qtipcli.errors import BusyError, CorruptError, MismatchError, QtipError, SettingsError, StorageError
from qtipcli.job import lock
from qtipcli.job.directory import RunDirectory
from qtipcli.job.shards import write_shard


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(content)


def test_the_same_command_continues_and_reads_back_what_was_committed(tmp_path: Path) -> None:
    path = tmp_path / "parent" / "job"
    assert do_job(path, KEYS[:2]) == list(KEYS[:2])
    assert do_job(path) == [KEYS[2]]
    assert do_job(path) == []
    run = RunDirectory.load(path, "calibrate")
    assert run.keys() == list(KEYS)
    assert (run.settings, run.fingerprint) == (SETTINGS, FINGERPRINT)
    for key in KEYS:
        assert run.done(key) and run.report(key) == report_of(key)
        tensors = run.read(key)
        assert tensors.keys() == tensors_of(key).keys()
        assert all(torch.equal(tensors[name], tensor) for name, tensor in tensors_of(key).items())
        with run.open_shard(key) as reader:
            assert torch.equal(reader.get_tensor("weight"), tensors_of(key)["weight"])
    assert names(path) == {"job.json", "ledger.jsonl", *(f"{key}.safetensors" for key in KEYS)}


def test_job_json_is_never_rewritten_on_resume(tmp_path: Path) -> None:
    do_job(tmp_path, KEYS[:1])
    before = (tmp_path / "job.json").stat()
    do_job(tmp_path)
    after = (tmp_path / "job.json").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_settings_are_the_same_when_json_says_the_same(tmp_path: Path) -> None:
    do_job(tmp_path, settings={"widths": (1, 2), "scale": torch.tensor(0.5), "share": float("nan")})
    assert do_job(tmp_path, settings={"share": float("nan"), "scale": 0.5, "widths": [1, 2]}) == []


def test_each_field_that_differs_is_named_with_both_values(tmp_path: Path) -> None:
    do_job(tmp_path)
    before = snapshot(tmp_path)
    settings = {"bits": 3, "data": {"samples": 64, "name": "code"}, "seed": 1}
    with pytest.raises(MismatchError) as caught:
        open_run(tmp_path, stage="quantize", settings=settings)
    assert caught.value.message == (
        f"{tmp_path} holds another job: settings.bits is 2 there and 3 here; settings.data.samples is 128 there and 64 here; "
        "settings.ratio is 0.1 there and absent here; settings.seed is absent there and 1 here; "
        'stage is "calibrate" there and "quantize" here'
    )
    assert "--force" in caught.value.hint
    with pytest.raises(MismatchError, match=r"fingerprint\.model\.model\.safetensors\.bytes is 10 there and 11 here"):
        open_run(tmp_path, fingerprint={"model": {"model.safetensors": {"bytes": 11, "sha256": "00"}}})
    assert snapshot(tmp_path) == before


def test_a_message_of_many_differences_stays_short(tmp_path: Path) -> None:
    do_job(tmp_path, fingerprint={f"file-{number:03d}": "a" * 500 for number in range(200)})
    with pytest.raises(MismatchError, match="and 192 more") as caught:
        open_run(tmp_path, fingerprint={f"file-{number:03d}": "b" * 500 for number in range(200)})
    assert len(caught.value.message) < 1500


def test_force_starts_a_job_of_other_settings_again_and_spares_the_files_of_others(tmp_path: Path) -> None:
    do_job(tmp_path)
    others = {"notes.txt": b"mine", "ledger.json": b"{}", ".hidden": b"", "model.safetensors": b"\x00" * 40}
    for name, content in others.items():
        (tmp_path / name).write_bytes(content)
    foreign_shard = tmp_path / "block-00009.safetensors"  # valid, and named like ours, but not written by a job
    torch_bytes = safetensors.torch.save({"weight": torch.ones(3)})
    foreign_shard.write_bytes(torch_bytes)
    (tmp_path / f"{KEYS[1]}.safetensors").write_bytes(b"damaged, but the ledger knows it")
    assert do_job(tmp_path, KEYS[:1], settings=SETTINGS | {"bits": 3}, force=True) == [KEYS[0]]
    assert {name: (tmp_path / name).read_bytes() for name in others} == others
    assert foreign_shard.read_bytes() == torch_bytes
    ours = {"job.json", "ledger.jsonl", f"{KEYS[0]}.safetensors"}
    assert names(tmp_path) == ours | set(others) | {foreign_shard.name}


def test_force_does_not_throw_away_a_job_that_is_the_same(tmp_path: Path) -> None:
    do_job(tmp_path, KEYS[:2])
    assert do_job(tmp_path, force=True) == [KEYS[2]]


def test_a_foreign_shard_is_not_overwritten_by_a_commit(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        (tmp_path / f"{KEYS[0]}.safetensors").write_bytes(b"mine")
        with pytest.raises(SettingsError, match=r"block-00000\.safetensors is not this job's"):
            run.commit(KEYS[0], tensors_of(KEYS[0]))
    assert (tmp_path / f"{KEYS[0]}.safetensors").read_bytes() == b"mine"


def test_a_directory_with_other_files_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(SettingsError, match="is not empty and is not a qtip run directory") as caught:
        open_run(tmp_path)
    assert caught.value.exit_code == 2
    assert names(tmp_path) == {"thesis.tex"}
    assert do_job(tmp_path, force=True) == list(KEYS)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("name", ["job.json", "ledger.jsonl", "lock"])
def test_a_file_of_others_with_a_name_of_ours_is_refused_even_with_force(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text('{"name": "another program"}')
    with pytest.raises(SettingsError, match=f"{name} is not a qtip job's file"):
        open_run(tmp_path, force=True)
    assert snapshot_of_names(tmp_path) == {name: '{"name": "another program"}'}


def snapshot_of_names(path: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in path.iterdir()}


def test_a_file_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "job").write_text("")
    with pytest.raises(SettingsError, match="is a file"):
        open_run(tmp_path / "job")


def test_reading_what_is_not_a_job_is_refused(tmp_path: Path) -> None:
    with pytest.raises(QtipError, match="is not a qtip run directory"):
        RunDirectory.load(tmp_path)
    do_job(tmp_path)
    with pytest.raises(MismatchError, match="holds a calibrate job, not a quantize job"):
        RunDirectory.load(tmp_path, "quantize")
    with pytest.raises(QtipError, match="block-00077 is not done"):
        RunDirectory.load(tmp_path).read("block-00077")


def test_a_damaged_job_json_is_named_and_force_starts_again(tmp_path: Path) -> None:
    do_job(tmp_path)
    (tmp_path / "job.json").write_text('{"qtip": "0.')
    with pytest.raises(CorruptError, match=r"job\.json is damaged"):
        open_run(tmp_path)
    assert do_job(tmp_path, force=True) == list(KEYS)


def test_a_changed_digit_in_job_json_is_damage_and_not_another_job(tmp_path: Path) -> None:
    do_job(tmp_path)
    file = tmp_path / "job.json"
    text = file.read_text()
    for old, new in (('"samples": 128', '"samples": 129'), ('"stage"', '"stbge"')):
        file.write_text(text.replace(old, new))
        for read in (open_run, RunDirectory.load):
            with pytest.raises(CorruptError, match=r"job\.json is damaged: it is not what was written"):
                read(tmp_path)
    file.write_text('{"check": "5", "id": 7}')
    with pytest.raises(SettingsError, match="is not a qtip job's file"):
        do_job(tmp_path, force=True)


def test_a_job_of_an_older_version_which_wrote_no_checksum_goes_on(tmp_path: Path) -> None:
    do_job(tmp_path)
    file = tmp_path / "job.json"
    job = json.loads(file.read_text())
    del job["check"]
    file.write_text(json.dumps(job))
    assert do_job(tmp_path) == []


@pytest.mark.parametrize("damage", ["missing", "truncated", "extended"])
def test_a_shard_of_the_wrong_size_is_named_at_resume_and_only_it_is_done_again(damage: str, tmp_path: Path) -> None:
    do_job(tmp_path / "oracle")
    do_job(tmp_path / "job")
    shard = tmp_path / "job" / f"{KEYS[2]}.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] if damage == "truncated" else content + b"\0")
    if damage == "missing":
        shard.unlink()
    with pytest.raises(CorruptError, match=KEYS[2]) as caught:
        open_run(tmp_path / "job")
    assert "--force" in caught.value.hint
    with pytest.raises(CorruptError, match=KEYS[2]):
        RunDirectory.load(tmp_path / "job").read(KEYS[2])
    assert do_job(tmp_path / "job", repair=True) == [KEYS[2]]
    assert snapshot(tmp_path / "job") == snapshot(tmp_path / "oracle")


@pytest.mark.parametrize("position", [0, 3, 9, 40, 400, -1])
def test_a_flipped_bit_is_named_when_the_job_goes_on_or_the_shard_is_read_and_only_it_is_done_again(
    position: int, tmp_path: Path
) -> None:
    do_job(tmp_path)
    with open_run(tmp_path) as run:
        flip(tmp_path / f"{KEYS[1]}.safetensors", position)
        with pytest.raises(CorruptError, match=rf"{KEYS[1]}\.safetensors") as caught:
            run.read(KEYS[1])
        assert "--force" in caught.value.hint
        assert list(run.damaged()) == [KEYS[1]]
        assert run.damaged(in_full=False) == {}
    with pytest.raises(CorruptError, match=rf"{KEYS[1]}\.safetensors"):
        do_job(tmp_path)  # or it would say that it is done
    assert do_job(tmp_path, force=True) == [KEYS[1]]
    assert RunDirectory.load(tmp_path).damaged() == {}


def test_forgotten_shards_are_done_again_and_nothing_else(tmp_path: Path) -> None:
    do_job(tmp_path)
    with open_run(tmp_path) as run:
        run.forget(KEYS[0], KEYS[2])
        assert run.keys() == [KEYS[1]]
        assert not (tmp_path / f"{KEYS[0]}.safetensors").exists()
    assert do_job(tmp_path) == [KEYS[0], KEYS[2]]


def test_what_a_key_or_a_second_commit_may_not_be(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        for key in ("", "../escape", "a/b", ".hidden", "x" * 201, "line\n"):
            with pytest.raises(ValueError, match="cannot name a shard"):
                run.commit(key, {})
        run.commit("model.layers.0.mlp", {})
        with pytest.raises(ValueError, match="is done already"):
            run.commit("model.layers.0.mlp", {})
    with pytest.raises(ValueError, match="open for reading only"):
        RunDirectory.load(tmp_path).commit("other", {})


def test_a_report_that_is_not_json_leaves_nothing_behind(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        with pytest.raises(TypeError, match="no place in a record"):
            run.commit(KEYS[0], tensors_of(KEYS[0]), {"file": object()})
        assert names(tmp_path) == {"job.json", "lock"}
        run.commit(KEYS[0], {}, {"loss": float("nan"), "bits": torch.tensor(2), "share": None, "shape": (1,)})
    for reader in (run, RunDirectory.load(tmp_path)):
        assert json.dumps(reader.report(KEYS[0])) == '{"bits": 2, "loss": NaN, "shape": [1], "share": null}'


def test_a_second_process_is_refused_by_the_pid_of_the_first_and_let_in_after_its_death(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    do_job(tmp_path, KEYS[:1])
    is_open, tell_open = os.pipe()

    def hold() -> None:
        run = open_run(tmp_path)
        os.write(tell_open, b"!")
        signal.pause()
        run.close()

    pid = fork(hold)
    os.read(is_open, 1)
    monkeypatch.setattr(lock, "_PATIENCE_S", 0.1)
    with pytest.raises(BusyError, match=rf"another qtip \(process {pid} on host .+\) works in {tmp_path}"):
        open_run(tmp_path)
    monkeypatch.setattr(lock, "_PATIENCE_S", 60.0)  # whatever else this machine is doing
    assert RunDirectory.load(tmp_path).report(KEYS[0]) == report_of(KEYS[0])  # reading needs no lock
    os.kill(pid, signal.SIGKILL)
    assert do_job(tmp_path) == list(KEYS[1:])  # at once: the lock waits for the kernel to clean up
    assert exit_status(pid) == -signal.SIGKILL
    os.close(is_open)
    os.close(tell_open)


def test_many_processes_at_once_do_each_shard_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_PATIENCE_S", 60.0)
    do_job(tmp_path / "oracle")
    pids = [fork(lambda: do_job(tmp_path / "job")) for _ in range(6)]
    assert [exit_status(pid) for pid in pids] == [0] * 6
    assert snapshot(tmp_path / "job") == snapshot(tmp_path / "oracle")


def test_a_lock_file_that_its_holder_deletes_in_between_is_not_taken_for_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lock"
    original = fcntl.flock
    deletions = iter([True])

    def flock(descriptor: int, operation: int) -> None:
        if next(deletions, False):
            path.unlink()  # the holder is done between our open and our flock
        original(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    held = lock.Lock(path)
    assert os.fstat(held._descriptor).st_ino == path.stat().st_ino
    held.release()
    held.release()
    assert names(tmp_path) == set()


def test_what_a_killed_process_left_is_swept_away_at_the_next_opening_and_nothing_else(tmp_path: Path) -> None:
    do_job(tmp_path, KEYS[:1])
    before = names(tmp_path)
    write_shard(tmp_path / "block-00099.safetensors", {}, {"qtip_shard": "block-00099"})  # killed before its ledger line
    (tmp_path / ".block-00098.safetensors.qtip-tmp").write_bytes(b"half")
    (tmp_path / ".notes.swp").write_bytes(b"mine")
    open_run(tmp_path).close()
    assert names(tmp_path) == before | {".notes.swp"}


def test_a_forgotten_shard_that_cannot_be_deleted_is_undone_even_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    do_job(tmp_path)

    def fail(path: Path, **options: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with open_run(tmp_path) as run, monkeypatch.context() as patch, pytest.raises(StorageError, match="input/output error"):
        patch.setattr(os, "unlink", fail)
        run.forget(KEYS[0])
    assert do_job(tmp_path) == [KEYS[0]]
