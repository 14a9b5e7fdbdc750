"""Shards: complete or absent, the same bytes each time, readable by the safetensors package, damage named."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from job.tiny import names
from qtipcli.errors import CorruptError, StorageError
from qtipcli.job.files import sha256_file, write_atomic, write_text_atomic
from qtipcli.job.header import read_header
from qtipcli.job.shards import _DTYPE_NAMES, open_shard, read_shard, write_shard

TENSORS = {"b": torch.arange(6.0).view(2, 3), "a": torch.ones(4), "ü": torch.tensor(2.0), "none": torch.zeros(0, 5)}


def test_bytes_are_those_of_the_safetensors_package(tmp_path: Path) -> None:
    # One dtype and one metadata entry: there the package's own order is defined too.
    write_shard(tmp_path / "ours", TENSORS)
    assert (tmp_path / "ours").read_bytes() == safetensors.torch.save(TENSORS, {"format": "pt"})


def test_equal_tensors_give_equal_bytes_in_whatever_order_and_strides(tmp_path: Path) -> None:
    metadata = {str(number): "x" for number in range(20)}
    first = write_shard(tmp_path / "first", TENSORS, metadata)
    turned = {name: TENSORS[name] for name in reversed(TENSORS)}
    turned["b"] = TENSORS["b"].T.contiguous().T  # the same values, other strides
    second = write_shard(tmp_path / "second", turned, dict(reversed(metadata.items())))
    assert first == second == sha256_file(tmp_path / "second")
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    assert first == hashlib.sha256((tmp_path / "first").read_bytes()).hexdigest()


@st.composite
def random_tensors(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    tensors = {}
    for name in draw(st.sets(st.text(min_size=1, max_size=8).filter(lambda text: text.isprintable()), max_size=5)):
        dtype = draw(st.sampled_from(list(_DTYPE_NAMES)))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        count = int(torch.tensor(shape).prod()) if shape else 1
        raw = torch.tensor(draw(st.lists(st.integers(0, 1), min_size=count * 8, max_size=count * 8)), dtype=torch.uint8)
        tensors[name] = raw[: count * dtype.itemsize].view(dtype).reshape(shape)
    return tensors


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tensors=random_tensors())
def test_any_tensors_are_read_back_bit_for_bit(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    sha256 = write_shard(tmp_path / "shard", tensors, {"key": "välue"})
    read = read_shard(tmp_path / "shard", sha256)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        assert as_bytes(read[name]) == as_bytes(tensor)
    with open_shard(tmp_path / "shard") as reader:
        assert reader.metadata() == {"format": "pt", "key": "välue"}
        assert set(reader.keys()) == tensors.keys()


def test_a_shard_cut_at_any_length_is_named(tmp_path: Path) -> None:
    write_shard(tmp_path / "whole", TENSORS)
    content = (tmp_path / "whole").read_bytes()
    shard = tmp_path / "cut.safetensors"
    for length in range(len(content)):
        shard.write_bytes(content[:length])
        with pytest.raises(CorruptError, match=r"cut\.safetensors"):
            read_shard(shard)
        with pytest.raises(CorruptError, match=r"cut\.safetensors"), open_shard(shard):
            pass


def test_any_flipped_bit_is_found_by_the_checksum_and_without_it_never_ends_in_another_exception(tmp_path: Path) -> None:
    shard = tmp_path / "flipped.safetensors"
    sha256 = write_shard(shard, TENSORS)
    content = bytearray(shard.read_bytes())
    for position in range(len(content)):
        content[position] ^= 1 << position % 8
        shard.write_bytes(content)
        with pytest.raises(CorruptError, match=r"flipped\.safetensors"):
            read_shard(shard, sha256)
        try:
            read_shard(shard)
        except CorruptError as error:
            assert "flipped.safetensors" in error.message
        content[position] ^= 1 << position % 8


def test_headers_made_to_confuse_are_corrupt_files(tmp_path: Path) -> None:
    for text in (
        b"",
        b"null",
        b"[]",
        b"{",
        b'{"a": 1}',
        b'{"a": {}}',
        b'{"a": {"data_offsets": "xy"}}',
        b"[" * 100_000,
        b"\xff",
    ):
        (tmp_path / "odd").write_bytes(len(text).to_bytes(8, "little") + text)
        with pytest.raises(CorruptError, match="odd"):
            read_header(tmp_path / "odd")
    (tmp_path / "odd").write_bytes(b"\xff" * 100)
    with pytest.raises(CorruptError, match="odd"):
        read_header(tmp_path / "odd")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="absent does not exist"):
        read_shard(tmp_path / "absent")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(5, "Input/output error")])
def test_whatever_ends_a_write_the_old_file_stays_and_no_temporary_file_does(error: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text_atomic(path, "old")

    def chunks():
        yield b"new"
        raise error

    expected = StorageError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        write_atomic(path, chunks())
    assert names(tmp_path) == {"file"}
    assert path.read_text() == "old"


def test_the_file_is_synced_before_it_is_renamed_and_the_directory_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    for name in ("write", "fsync", "replace"):
        original = getattr(os, name)

        def call(*arguments, name=name, original=original):
            is_directory = name == "fsync" and Path(f"/proc/self/fd/{arguments[0]}").is_dir()
            calls.append("sync directory" if is_directory else name)
            return original(*arguments)

        monkeypatch.setattr(os, name, call)
    write_text_atomic(tmp_path / "file", "text")
    assert calls == ["write", "fsync", "replace", "sync directory"]
