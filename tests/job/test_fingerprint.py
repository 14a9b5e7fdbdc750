"""Fingerprints: equal for equal inputs, different for what a user could confuse, and cheap."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from qtipcli.errors import CorruptError, QtipError, StorageError
from qtipcli.job.fingerprint import fingerprint_bytes, fingerprint_model, fingerprint_text, fingerprint_versions
from qtipcli.job.shards import write_shard


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    weights = torch.arange(3_000_000, dtype=torch.int32)  # 12 MB: more than the samples cover
    write_shard(directory / "model-00001.safetensors", {"big": weights})
    write_shard(directory / "model-00002.safetensors", {"small": torch.zeros(100)})
    (directory / "config.json").write_text('{"hidden_size": 64}')
    return directory


def test_a_copy_has_the_same_fingerprint_and_other_files_do_not_matter(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("hello")
    assert fingerprint_model(model) == fingerprint_model(tmp_path / "copy")
    assert fingerprint_model(model)["model-00001.safetensors"]["bytes"] == (model / "model-00001.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("name", "position"),
    [
        ("config.json", 3),
        ("model-00001.safetensors", 30),  # a name in the header
        ("model-00001.safetensors", -1),  # the last sample ends with the file
        ("model-00002.safetensors", 300),  # a small file counts in full
    ],
)
def test_a_change_is_seen_and_the_file_is_named(name: str, position: int, model: Path) -> None:
    before = fingerprint_model(model)
    content = bytearray((model / name).read_bytes())
    content[position] ^= 1
    (model / name).write_bytes(content)
    after = fingerprint_model(model)
    assert [file for file in before if before[file] != after[file]] == [name]


def test_weights_that_were_trained_further_are_seen(model: Path) -> None:
    before = fingerprint_model(model)
    write_shard(model / "model-00001.safetensors", {"big": torch.arange(3_000_000, dtype=torch.int32) + 1})
    assert fingerprint_model(model) != before


def test_a_header_that_is_longer_than_a_sample_counts_in_full(model: Path) -> None:
    tensors = {f"tensor-{number:05d}": torch.zeros(1000) for number in range(2000)}  # 8 MB after a header of 150 kB
    write_shard(model / "model-00001.safetensors", tensors)
    before = fingerprint_model(model)
    tensors["tensor-01001x"] = tensors.pop("tensor-01001")
    tensors["tensor-0100"] = tensors.pop("tensor-01002")  # as many bytes as before
    write_shard(model / "model-00001.safetensors", tensors)
    after = fingerprint_model(model)
    assert before["model-00001.safetensors"]["bytes"] == after["model-00001.safetensors"]["bytes"]
    assert before != after


def test_a_directory_without_weights_a_missing_one_and_a_cut_off_file_are_named(model: Path, tmp_path: Path) -> None:
    with pytest.raises(QtipError, match=r"has no \*\.safetensors weights"):
        fingerprint_model(tmp_path)
    with pytest.raises(StorageError, match="nowhere does not exist"):
        fingerprint_model(tmp_path / "nowhere")
    weights = model / "model-00001.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(CorruptError, match=r"model-00001\.safetensors is damaged: \d+ bytes where its header says \d+"):
        fingerprint_model(model)


def test_the_borders_of_parts_count() -> None:
    assert fingerprint_text("ab", "c") != fingerprint_text("a", "bc") != fingerprint_text("abc")
    assert fingerprint_text("ü") == fingerprint_bytes("ü".encode())


def test_versions_are_those_that_can_change_a_result() -> None:
    versions = fingerprint_versions()
    assert versions.keys() == {"qtipcli", "torch", "transformers", "numba"}
    assert versions["torch"] == ".".join(torch.__version__.split("+")[0].split(".")[:2])
