"""What a user can do wrong: each ends in one line with the thing and the fact, a hint, a status, and nothing half-written.

The list is that of the issue "The whole pipeline on a CPU", section "Bad input".
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from stages.fixtures import Outcome, Qtip
from stages.tiny import FAST_OPTIONS, snapshot


def complaint(outcome: Outcome, *words: str) -> str:
    """Checks that `outcome` is one line with `words` in it, and a hint, after progress and notes only; returns the line."""
    assert outcome.status in (1, 2), outcome
    assert "Traceback" not in outcome.err
    lines = outcome.err.splitlines()
    said = [line for line in lines if line.startswith("qtip: ")]
    assert len(said) == 1, outcome.err
    assert lines[-2] == said[0], outcome.err
    assert lines[-1].startswith("  hint: "), outcome.err
    for word in words:
        assert word in said[0] + lines[-1], outcome.err
    assert not outcome.out
    return said[0]


def left_behind(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


@pytest.fixture
def own_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tiny model to damage."""
    return Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("own") / "model"))


@pytest.fixture
def own_packed(packed: Path, tmp_path: Path) -> Path:
    """A copy of the finished run to damage, in the directory where commands run."""
    shutil.copytree(packed, tmp_path, dirs_exist_ok=True)
    return tmp_path


def flip(file: Path, position: int = -1) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


# Models


def test_a_model_that_does_not_exist(quantize: Qtip, tmp_path: Path) -> None:
    complaint(quantize("--out", "out", model="./no-such-model"), "no-such-model", "does not exist")
    complaint(quantize("--out", "out", model="nobody/no-such-model"), "nobody/no-such-model")
    assert not left_behind(tmp_path)


def test_a_directory_that_is_no_model(quantize: Qtip, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    complaint(quantize("--out", "out", model="./empty"), "empty", "config.json")
    assert left_behind(tmp_path) == {"empty"}


def test_a_directory_without_weights(quantize: Qtip, own_model: Path, tmp_path: Path) -> None:
    (own_model / "model.safetensors").unlink()
    complaint(quantize("--out", "out", model=own_model), str(own_model), "safetensors")
    assert not left_behind(tmp_path)


def test_pickled_weights(quantize: Qtip, own_model: Path, tmp_path: Path) -> None:
    (own_model / "model.safetensors").rename(own_model / "pytorch_model.bin")
    complaint(quantize("--out", "out", model=own_model), str(own_model), ".bin")
    assert not left_behind(tmp_path)


def test_a_model_that_is_quantized_already(quantize: Qtip, packed: Path, tmp_path: Path) -> None:
    complaint(quantize("--out", "again", model=packed / "out"), str(packed / "out"), "already quantized (qtip)")
    assert not left_behind(tmp_path)


def test_a_shard_that_is_cut_off(quantize: Qtip, own_model: Path, tmp_path: Path) -> None:
    shard = own_model / "model.safetensors"
    os.truncate(shard, shard.stat().st_size - 100)
    complaint(quantize("--out", "out", model=own_model), str(shard))
    assert not left_behind(tmp_path)


def test_a_shard_that_changed_since_calibration(quantize: Qtip, own_model: Path, tmp_path: Path) -> None:
    assert quantize("--out", "out", "--hessians", "hessians", "--no-pack", model=own_model).status == 0
    before = snapshot(tmp_path)
    flip(own_model / "model.safetensors")
    complaint(quantize("--out", "out", "--hessians", "hessians", model=own_model), "model.safetensors", "hessians")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(bad: float, quantize: Qtip, own_model: Path, tmp_path: Path) -> None:
    weights = load_file(own_model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = bad
    save_file(weights, own_model / "model.safetensors", {"format": "pt"})
    complaint(quantize("--out", "out", model=own_model), "model.layers.1.mlp.up_proj.weight", "NaN or infinite")
    assert "out" not in left_behind(tmp_path)


def test_a_layer_that_sees_only_zeros_is_rounded_and_reported(quantize: Qtip, own_model: Path, tmp_path: Path) -> None:
    weights = load_file(own_model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"].zero_()
    save_file(weights, own_model / "model.safetensors", {"format": "pt"})
    outcome = quantize("--out", "out", model=own_model)
    assert outcome.status == 0, outcome.err
    assert "model.layers.1.mlp.down_proj: 100 of 100 inputs were always zero" in outcome.err
    report = json.loads((tmp_path / "out" / "qtip.json").read_text())["layers"]["model.layers.1.mlp.down_proj"]
    assert report["dead_inputs"] == 100
    scales = load_file(tmp_path / "out" / "model.safetensors")
    assert not scales["model.layers.1.mlp.up_proj.scale_out"].any()
    assert all(torch.isfinite(tensor).all() for name, tensor in scales.items() if ".scale_" in name)


# Settings


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--bits", "0.5"), ("0.5", "1")),
        (("--bits", "8.5"), ("8.5", "8")),
        (("--bits", "9"), ("9 bits", "8")),
        (("--bits", "0"), ("0 bits", "1")),
        (("--bits", "nan"), ("nan",)),
        (("--bits", "4.5", "--code", "hyb"), ("4.5", "4")),
        (("--code", "2mad"), ("2mad", "1mad, 3inst")),
        (("--state-bits", "7"), ("7", "8 to 16")),
        (("--transform", "none"), ("none", "full")),
        (("--layer", "*.v_proj=2.25"), ("2.25", "2 and 3")),
        (("--layer", "*.v_proj=two"), ("*.v_proj=two",)),
        (("--layer", "*.v_proj"), ("*.v_proj",)),
        (("--layer", "*.v_proj=2.25", "--bits", "2.4"), ("2.25", "2 and 3")),
        (("--bits", "2.4", "--size", "1GB"), ("2.4", "1GB", "one of the two")),
        (("--size", "large"), ("large", "GiB")),
        (("--size", "1.2 parsec"), ("1.2 parsec", "GiB")),
        (("--size", "0MB"), ("0MB", "GiB")),
        (("--size", "100KB"), ("100,000 bytes", "the smallest possible is")),
        (("--windows", "4"), ("windows", "--allocate")),
        (("--bits", "2.4", "--code", "2mad"), ("2mad", "1mad, 3inst")),
        (("--preset", "papre"), ("papre", "paper")),
        (("--damping", "-1"), ("damping", "-1")),
        (("--scale", "0"), ("scale", "0")),
        (("--head-bits", "2.25"), ("head_bits", "2.25", "2 and 3")),
        (("--embedding-bits", "9"), ("embedding_bits", "9 bits", "8")),
        (("--embedding-bits", "6", "--code", "hyb"), ("embedding_bits", "hyb", "6")),
        (("--head-bits", "4"), ("token embedding", "say --embedding-bits 4")),
        (("--head-bits", "4", "--embedding-bits", "6"), ("token embedding", "leave --head-bits out")),
    ],
)
def test_settings_that_nothing_offers(options: tuple[str, ...], words: tuple[str, ...], quantize: Qtip, tmp_path: Path) -> None:
    outcome = quantize("--out", "out", *options)
    assert outcome.status == 2
    complaint(outcome, *words)
    assert not left_behind(tmp_path)


@pytest.mark.parametrize("option", [("--skip", "*.w_proj"), ("--layer", "*.w_proj=4")])
def test_a_pattern_that_matches_no_layer(option: tuple[str, str], quantize: Qtip, tmp_path: Path) -> None:
    complaint(quantize("--out", "out", *option), "*.w_proj", "model.layers.0.self_attn.q_proj")
    assert "out" not in left_behind(tmp_path)


def test_more_context_than_the_model_has(quantize: Qtip, tmp_path: Path) -> None:
    complaint(quantize("--out", "out", "--context", "128"), "128", "64")
    assert not left_behind(tmp_path)


# Text


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", ("empty",)), (b" \n", ("no text",)), (bytes(range(256)), ("not UTF-8",)), (b"short", ("tokens", "32"))],
    ids=["empty", "blank", "binary", "short"],
)
def test_text_that_gives_no_window(content: bytes, words: tuple[str, ...], quantize: Qtip, tmp_path: Path) -> None:
    (tmp_path / "my.txt").write_bytes(content)
    complaint(quantize("--out", "out", data=Path("my.txt")), "my.txt", *words)
    assert left_behind(tmp_path) == {"my.txt"}


def test_text_that_does_not_exist(quantize: Qtip, tmp_path: Path) -> None:
    complaint(quantize("--out", "out", data=Path("missing.txt")), "missing.txt", "does not exist")
    assert not left_behind(tmp_path)


# Jobs and packed directories


def test_a_job_of_other_settings(quantize: Qtip, own_packed: Path) -> None:
    before = snapshot(own_packed)
    outcome = quantize("--out", "out", "--hessians", "hessians", "--bits", "3", "--damping", "0.1")
    complaint(outcome, "out")
    assert snapshot(own_packed) == before
    (own_packed / "out").rename(own_packed / "kept")
    outcome = quantize("--out", "out", "--hessians", "hessians", "--bits", "3", "--damping", "0.1")
    complaint(outcome, "out.job", "bits", "damping")
    outcome = quantize("--out", "out", "--hessians", "hessians", "--seed", "5")
    complaint(outcome, "hessians", "seed")


def test_a_job_of_another_model(quantize: Qtip, qtip: Qtip, own_packed: Path, own_model: Path) -> None:
    flip(own_model / "model.safetensors")
    before = snapshot(own_packed)
    complaint(quantize("--out", "new", "--hessians", "hessians", model=own_model), "hessians", "model")
    complaint(qtip("pack", own_model, "out.job", "--out", "new"), "out.job", "another model")
    assert snapshot(own_packed) == before


def test_an_output_directory_that_is_not_empty(quantize: Qtip, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    complaint(quantize("--out", "out"), "out is not empty", "--force")
    assert left_behind(tmp_path) == {"out"}
    assert left_behind(tmp_path / "out") == {"thesis.txt"}
    assert quantize("--out", "out", "--force").status == 0
    assert (tmp_path / "out" / "config.json").is_file()


def test_packing_over_other_files(qtip: Qtip, tiny_model: Path, own_packed: Path) -> None:
    (own_packed / "mine").mkdir()
    (own_packed / "mine" / "thesis.txt").write_text("years of work")
    complaint(qtip("pack", tiny_model, "out.job", "--out", "mine"), "mine is not empty", "--force")
    assert left_behind(own_packed / "mine") == {"thesis.txt"}


def test_an_output_that_is_a_file(quantize: Qtip, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    complaint(quantize("--out", "out"), "out is a file")
    assert left_behind(tmp_path) == {"out"}


@pytest.mark.parametrize("where", [".", "..", "/"])
def test_an_output_that_would_replace_where_we_are(where: str, quantize: Qtip, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for force in ([], ["--force"]):
        complaint(quantize("--out", where, *force), "cannot be replaced")
    assert left_behind(tmp_path) == {"mine.txt"}


@pytest.mark.parametrize("how", ["bit", "cut", "gone"])
def test_a_damaged_shard_of_a_job(how: str, quantize: Qtip, qtip: Qtip, tiny_model: Path, own_packed: Path) -> None:
    oracle = snapshot(own_packed / "out")
    shutil.rmtree(own_packed / "out")
    shard = own_packed / "out.job" / "block-00001.safetensors"
    damage(shard, how)
    for outcome in (qtip("pack", tiny_model, "out.job", "--out", "out"), quantize("--out", "out", "--hessians", "hessians")):
        complaint(outcome, "block-00001.safetensors", "--force")
        assert "out" not in left_behind(own_packed)
    assert quantize("--out", "out", "--hessians", "hessians", "--force").status == 0
    assert snapshot(own_packed / "out") == oracle


@pytest.mark.parametrize("how", ["bit", "cut", "gone"])
def test_a_damaged_shard_of_the_hessians(how: str, quantize: Qtip, own_packed: Path) -> None:
    damage(own_packed / "hessians" / "block-00001.safetensors", how)
    command = ("--out", "new", "--hessians", "hessians", "--bits", "3", "--original-prefix")
    complaint(quantize(*command), "block-00001.safetensors", "--force")
    assert "new" not in left_behind(own_packed)


@pytest.mark.parametrize("how", ["bit", "cut", "gone"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_file_of_a_packed_model(name: str, how: str, qtip: Qtip, own_packed: Path) -> None:
    damage(own_packed / "out" / name, how)
    complaint(qtip("inspect", "out"), name)


def damage(file: Path, how: str) -> None:
    if how == "bit":
        flip(file)
    elif how == "cut":
        os.truncate(file, file.stat().st_size - 10)
    else:
        file.unlink()


def test_a_damaged_packed_model_is_packed_again_with_force(quantize: Qtip, own_packed: Path) -> None:
    oracle = snapshot(own_packed / "out")
    flip(own_packed / "out" / "model.safetensors")
    complaint(quantize("--out", "out", "--hessians", "hessians"), "model.safetensors", "--force")
    assert quantize("--out", "out", "--hessians", "hessians", "--force").status == 0
    assert snapshot(own_packed / "out") == oracle


def test_an_unfinished_job_cannot_be_packed(qtip: Qtip, tiny_model: Path, own_packed: Path) -> None:
    ledger = own_packed / "out.job" / "ledger.jsonl"
    ledger.write_text(ledger.read_text().splitlines(keepends=True)[0])
    complaint(qtip("pack", tiny_model, "out.job", "--out", "new"), "out.job is not finished", "model.layers.1")
    assert "new" not in left_behind(own_packed)


def test_what_is_no_packed_model_cannot_be_inspected(qtip: Qtip, tiny_model: Path, own_packed: Path) -> None:
    complaint(qtip("inspect", tiny_model), "not a qtip model")
    complaint(qtip("inspect", "nowhere"), "nowhere")
    (own_packed / "out" / "model.safetensors.index.json").unlink()
    complaint(qtip("inspect", "out"), "unfinished")


def test_what_cannot_be_loaded_cannot_be_evaluated_or_continued(qtip: Qtip, text: Path) -> None:
    complaint(qtip("generate", "./nowhere", "--prompt", "x", "--json"), "nowhere")
    complaint(qtip("eval", "./nowhere", "--data", text), "nowhere")


# Disks


def test_no_permission_to_write(quantize: Qtip, tmp_path: Path) -> None:
    # Root may write anywhere but here.
    complaint(quantize("--out", "/proc/out"), "/proc/out")
    (tmp_path / "file").write_text("a file")
    complaint(quantize("--out", "file/out"), "file/out")
    complaint(quantize("--out", "out", "--hessians", "file/hessians"), "file/hessians")
    assert {"out", "file.job"}.isdisjoint(left_behind(tmp_path))


@pytest.mark.parametrize("limit", [1 << 10, 20 << 10, 60 << 10, 300 << 10])
def test_a_full_disk_then_the_same_command(limit: int, quantize: Qtip, own_packed: Path) -> None:
    """A limit on the size of files stands for the disk: writing fails at different stages, half-way through a file."""
    oracle = snapshot(own_packed / "out")
    for name in ("out", "out.job", "hessians"):
        shutil.rmtree(own_packed / name)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        outcome = quantize("--out", "out", "--hessians", "hessians")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    complaint(outcome, "cannot write", "ulimit")
    assert "out" not in left_behind(own_packed)
    assert not [file for file in own_packed.rglob("*") if "tmp" in file.name or "partial" in file.name]
    assert quantize("--out", "out", "--hessians", "hessians").status == 0
    assert snapshot(own_packed / "out") == oracle


@pytest.fixture
def small_disk(tmp_path_factory: pytest.TempPathFactory):
    """A file system of 1 MiB, where this user may mount one."""
    where = tmp_path_factory.mktemp("disk")
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", where]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted here")
    yield where
    subprocess.run(["umount", where], check=True)


def test_a_disk_that_is_full(small_disk: Path, quantize: Qtip) -> None:
    complaint(quantize("--out", small_disk / "out", "--hessians", small_disk / "hessians"), str(small_disk), "disk is full")
    assert "out" not in left_behind(small_disk)


def test_fast_options_are_what_is_tested(packed: Path) -> None:
    assert json.loads((packed / "out.job" / "job.json").read_text())["settings"]["state_bits"] == int(FAST_OPTIONS[1])


@pytest.mark.parametrize(
    "arguments", [["generate", "nowhere", "--prompt", "x"], ["eval", "nowhere"], ["eval", ".", "--base", "no where"]]
)
def test_a_model_to_run_that_does_not_exist_is_named_before_the_hub_is_asked(arguments, capsys, monkeypatch):
    from qtipcli.cli.main import _run

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert _run(arguments) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "does not exist" in printed.err and "hint: give a model's directory" in printed.err
