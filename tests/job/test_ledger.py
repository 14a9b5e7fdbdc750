"""The ledger: a torn end is dropped, damage elsewhere is named, and what is written is what is read."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qtipcli.errors import CorruptError, StorageError
from qtipcli.job.ledger import Entry, Ledger, shard_name
from qtipcli.job.record import encode

pytestmark = pytest.mark.usefixtures("no_sync")


def entry(number: int, report: dict | None = None) -> Entry:
    key = f"block-{number:05d}"
    return Entry(key, shard_name(key), 100 + number, f"{number:064x}", {"loss": number / 7} if report is None else report)


def written(path: Path, entries: int = 3) -> bytes:
    ledger = Ledger(path)
    for number in range(entries):
        ledger.append(entry(number))
    return path.read_bytes()


def test_a_ledger_cut_at_any_byte_keeps_every_whole_line_and_grows_again_to_the_same_bytes(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    content = written(path, 2)
    for length in range(len(content)):
        path.write_bytes(content[:length])
        ledger = Ledger(path)
        whole = content[:length].count(b"\n")
        assert list(ledger.entries.values()) == [entry(number) for number in range(whole)]
        assert path.read_bytes() == content[:length], "reading changes nothing"
        ledger.mend()
        assert path.read_bytes() == b"".join(content.splitlines(keepends=True)[:whole])
        for number in range(whole, 2):
            ledger.append(entry(number))
        assert path.read_bytes() == content


@pytest.mark.parametrize("tail", [b"\0" * 50, b"\0" * 50 + b"\n", b"{}\n", b"[1]\n", b"null\n", b"\xff\xfe\n", b"\n"])
def test_a_last_line_that_is_no_entry_is_dropped(tail: bytes, tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    content = written(path)
    path.write_bytes(content + tail)
    ledger = Ledger(path)
    assert len(ledger.entries) == 3
    ledger.mend()
    assert path.read_bytes() == content


def test_damage_before_the_last_line_is_named_by_its_number_and_repaired_on_request(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    content = written(path)
    lines = content.splitlines(keepends=True)
    for bad in (
        lines[1][:20] + b"\n",
        lines[1].replace(b"block-00001", b"../../passwd"),
        lines[0],
        b"\n",
        lines[1][:-1] + b"\r\n",
    ):
        path.write_bytes(lines[0] + bad + lines[2])
        with pytest.raises(CorruptError, match=r"ledger\.jsonl is damaged in line 2 of 3"):
            Ledger(path)
        ledger = Ledger(path, repair=True)
        assert list(ledger.entries.values()) == [entry(0), entry(2)]
        ledger.mend()
        assert path.read_bytes() == lines[0] + lines[2]


def test_no_flipped_bit_in_a_line_goes_unseen(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    lines = written(path).splitlines(keepends=True)
    for position in range(len(lines[1])):
        bad = bytearray(lines[1])
        bad[position] ^= 1 << position % 7
        path.write_bytes(lines[0] + bad + lines[2])
        if position == len(lines[1]) - 1:  # two lines became one, which is the last and counts as torn: both are done again
            assert list(Ledger(path).entries.values()) == [entry(0)]
            continue
        with pytest.raises(CorruptError, match="is damaged in line 2 of 3"):
            Ledger(path)


def test_lines_without_a_checksum_are_read_as_older_versions_wrote_them(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_text("".join(encode(asdict(entry(number))) + "\n" for number in range(2)))
    ledger = Ledger(path)
    assert list(ledger.entries.values()) == [entry(0), entry(1)]
    ledger.append(entry(2))
    assert list(Ledger(path).entries) == list(ledger.entries)


@pytest.mark.parametrize("failing", ["write", "fsync"])
def test_an_append_that_fails_leaves_the_ledger_as_it_was_and_may_be_tried_again(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ledger.jsonl"
    content = written(path)
    path.unlink()
    written(path, 2)
    ledger = Ledger(path)
    original = os.write

    def fail(descriptor: int, data: bytes | None = None) -> int:
        if data is not None:
            original(descriptor, data[:10])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(StorageError, match="the disk is full"):
        patch.setattr(os, failing, fail)
        ledger.append(entry(2))
    assert Ledger(path).entries.keys() == {"block-00000", "block-00001"}
    assert content.startswith(path.read_bytes())
    ledger.append(entry(2))
    assert path.read_bytes() == content


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.integers(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(report=st.dictionaries(st.text(), json_values, max_size=4) | st.dictionaries(st.integers(), json_values, max_size=4))
def test_any_report_is_read_back_as_it_was_recorded(report: dict, tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.unlink(missing_ok=True)
    ledger = Ledger(path)
    try:
        ledger.append(entry(0, report))
    except TypeError:  # JSON cannot sort keys of mixed types; refused before anything is written
        assert not path.exists()
        return
    ledger.append(entry(1))
    expected = encode(json.loads(encode(report)))  # number keys become text before they are sorted
    assert encode(Ledger(path).entries["block-00000"].report) == encode(ledger.entries["block-00000"].report) == expected
    assert Ledger(path).entries["block-00001"] == entry(1)
