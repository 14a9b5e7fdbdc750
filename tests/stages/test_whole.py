"""A packed directory is written by one process at a time, and is called complete only if it is what was written.

Oracle: the bytes of the directory as it was first written.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from qtipcli.errors import BusyError
from qtipcli.job.lock import Lock
from qtipcli.stages import pack
from qtipcli.stages.whole import only_writer, written_whole
from stages.fixtures import Qtip
from stages.tiny import FAST_OPTIONS, snapshot

FILES = ("model.safetensors", "model.safetensors.index.json", "qtip.json", "config.json", "tokenizer.json")


def change_a_digit(file: Path) -> None:
    """Or, where there is none, a bit: what was JSON stays JSON."""
    content = bytearray(file.read_bytes())
    digits = [place for place, byte in enumerate(content) if chr(byte) in "2468" and chr(content[place - 1]) in "0123456789"]
    if file.name == "config.json":
        content[-5] = 0xA0  # nor is it UTF-8 any more
    content[digits[len(digits) // 2] if digits and file.suffix == ".json" else -1] ^= 1
    file.write_bytes(content)


@pytest.fixture
def job(packed: Path, tmp_path: Path) -> Path:
    """A copy of the finished job, in the directory in which qtip runs."""
    return shutil.copytree(packed / "out.job", tmp_path / "out.job")


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_packed_model_is_not_called_complete(name: str, job: Path, tiny_model: Path, qtip: Qtip) -> None:
    pack = ("pack", tiny_model, job, "--out", "out")
    assert qtip(*pack).status == 0
    before = snapshot(Path("out"))
    change_a_digit(Path("out") / name)
    refused = qtip(*pack)
    assert refused.status == 1
    assert name in refused.err
    assert "--force" in refused.err
    assert qtip(*pack, "--force").status == 0
    assert snapshot(Path("out")) == before
    assert "is complete already" in qtip(*pack).err


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_tuned_model_is_not_called_complete(name: str, packed: Path, text: Path, qtip: Qtip) -> None:
    tune = ("finetune", packed / "out", "--data", text, "--context", "32", "--samples", "8", "--heldout", "2", "--blocks")
    assert qtip(*tune, "--out", "tuned").status == 0
    before = snapshot(Path("tuned"))
    change_a_digit(Path("tuned") / name)
    refused = qtip(*tune, "--out", "tuned")
    assert refused.status == (2 if name == "qtip.json" and "is not empty" in refused.err else 1)
    assert "--force" in refused.err
    assert qtip(*tune, "--out", "tuned", "--force").status == 0
    assert snapshot(Path("tuned")) == before


def test_where_the_original_lies_is_said_anew(job: Path, tiny_model: Path, qtip: Qtip, tmp_path: Path) -> None:
    assert qtip("pack", tiny_model, job, "--out", "out").status == 0
    moved = shutil.copytree(tiny_model, tmp_path / "elsewhere" / tiny_model.name)
    assert qtip("pack", moved, job, "--out", "out").status == 0
    assert str(moved) in Path("out/.qtip-local.json").read_text()


def test_two_processes_do_not_write_one_directory(job: Path, tiny_model: Path, qtip: Qtip, tmp_path: Path) -> None:
    lock = Lock(tmp_path / ".out.lock")
    refused = qtip("pack", tiny_model, job, "--out", "out")
    assert (refused.status, f"process {os.getpid()}" in refused.err, "works in out" in refused.err) == (1, True, True)
    lock.release()
    with only_writer(tmp_path / "out"), pytest.raises(BusyError), only_writer(tmp_path / "out"):
        pass


def test_what_a_killed_writer_left_is_gone_and_what_it_had_moved_away_is_back(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for left in ("out.partial", "out.replaced"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "file").write_text(left)
    with only_writer(out):
        assert (out / "file").read_text() == "out.replaced"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_exception_leaves_what_was_there(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(KeyboardInterrupt), only_writer(out), written_whole(out):
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_shard_of_the_job_that_is_damaged_names_the_command_that_makes_it(job: Path, tiny_model: Path, qtip: Qtip) -> None:
    change_a_digit(job / "block-00001.safetensors")
    refused = qtip("pack", tiny_model, job, "--out", "out")
    assert "block-00001.safetensors is damaged" in refused.err
    assert "give the quantize command again with --force, then pack" in refused.err
    assert not Path("out").exists()


def test_hessians_that_were_cut_short_are_named_though_nothing_is_left_to_be_rounded(
    packed: Path, tiny_model: Path, text: Path, qtip: Qtip, tmp_path: Path
) -> None:
    for name in ("hessians", "out.job", "out"):
        shutil.copytree(packed / name, tmp_path / name)
    shard = tmp_path / "hessians" / "block-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    quantize = ("quantize", tiny_model, *FAST_OPTIONS, "--data", text, "--out", "out", "--hessians", "hessians")
    refused = qtip(*quantize)
    assert refused.status == 1
    assert "block-00000.safetensors is damaged" in refused.err
    assert qtip(*quantize, "--force").status == 0
    assert snapshot(tmp_path / "hessians").keys() == snapshot(packed / "hessians").keys()


def test_ctrl_c_outside_a_safe_point_is_put_into_words(
    job: Path, tiny_model: Path, qtip: Qtip, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pack, "layout_of", stop)
    stopped = qtip("pack", tiny_model, job, "--out", "out")
    assert stopped.status == 130
    assert stopped.err.splitlines()[-2:] == [
        "qtip: stopped by Ctrl-C; a job keeps what is finished",
        "  hint: the same command goes on with it",
    ]
