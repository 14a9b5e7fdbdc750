"""Owns the ledger: one line of JSON for each finished shard, appended and synced; what has no line is not done.

A crash can only tear the last line, because every line is synced before the next is begun. A torn last line was never
acknowledged, so it is dropped; a bad line anywhere else is damage and is said to be. Each line ends in a checksum of the rest:
a changed digit in a report would otherwise pass for what was measured.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qtipcli.errors import CorruptError, storage_error
from qtipcli.job.files import sync_directory, write_all, write_text_atomic
from qtipcli.job.record import checksum, encode, normalized
from qtipcli.untrusted import parse_json

# Letters, digits, dot, dash, underscore: a key is a file name everywhere and never leaves its directory. 200 characters and
# what is put around them stay below the 255 bytes that file systems allow.
_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")


@dataclass(frozen=True)
class Entry:
    """One finished shard: key, file name, size in bytes, sha256 of the content as hex, and the stage's report."""

    key: str
    file: str
    bytes: int
    sha256: str
    report: dict[str, Any]


def shard_name(key: str) -> str:
    """The file name of the shard `key`. Raises ValueError for a key that cannot be one."""
    if not _KEY.fullmatch(key):
        raise ValueError(f"{key!r} cannot name a shard: letters, digits and . _ - only, at most 200")
    return f"{key}.safetensors"


class Ledger:
    """The entries of one ledger file, in the order in which they were done.

    Args:
        path: the file; absent means that nothing is done.
        repair: pass over bad lines in the middle (their shards count as not done) instead of raising CorruptError.
    """

    def __init__(self, path: Path, repair: bool = False) -> None:
        self.path = path
        self.entries: dict[str, Entry] = {}
        self._good_bytes = 0  # where the next line goes: everything before it is whole
        self._has_bad_lines = False
        self._has_torn_end = False
        try:
            content = path.read_bytes() if path.exists() else b""
        except OSError as error:
            raise storage_error(error, path, "read") from error
        lines = io.BytesIO(content).readlines()
        for number, line in enumerate(lines, start=1):
            entry = _parse(line)
            if entry is not None and entry.key not in self.entries:
                self.entries[entry.key] = entry
            elif number == len(lines):
                self._has_torn_end = True
                break
            elif repair:
                self._has_bad_lines = True
            else:
                raise CorruptError(
                    f"{path} is damaged in line {number} of {len(lines)}",
                    "give the same command with --force: only what that line recorded is done again",
                )
            self._good_bytes += len(line)

    def mend(self) -> None:
        """Make the file say exactly what was read: drop a torn last line, and bad lines passed over. Raises StorageError."""
        if self._has_bad_lines:
            self._rewrite()
        elif self._has_torn_end:
            self._truncate()

    def append(self, entry: Entry) -> None:
        """Record that `entry` is done; when this returns, a power cut no longer changes it. Raises StorageError.

        After any exception the file ends where it ended before.
        """
        entry = replace(entry, report=normalized(entry.report))
        line = _line(entry)
        try:
            is_new = not self.path.exists()
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                os.ftruncate(descriptor, self._good_bytes)  # whatever an append that failed may have left
                os.lseek(descriptor, self._good_bytes, os.SEEK_SET)
                write_all(descriptor, line)
                os.fsync(descriptor)
            except BaseException:
                os.ftruncate(descriptor, self._good_bytes)
                raise
            finally:
                os.close(descriptor)
            if is_new:
                sync_directory(self.path.parent)
        except OSError as error:
            raise storage_error(error, self.path) from error
        self._good_bytes += len(line)
        self.entries[entry.key] = entry

    def remove(self, keys: Iterable[str]) -> None:
        """Take these keys out, in one atomic step. Raises StorageError."""
        for key in keys:
            del self.entries[key]
        self._rewrite()

    def _rewrite(self) -> None:
        text = b"".join(map(_line, self.entries.values()))
        write_text_atomic(self.path, text.decode())
        self._good_bytes = len(text)
        self._has_bad_lines = self._has_torn_end = False

    def _truncate(self) -> None:
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.ftruncate(descriptor, self._good_bytes)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise storage_error(error, self.path) from error
        self._has_torn_end = False


def _line(entry: Entry, has_check: bool = True) -> bytes:
    fields = asdict(entry)
    return encode(fields | ({"check": checksum(fields)} if has_check else {})).encode() + b"\n"


def _parse(line: bytes) -> Entry | None:
    """The entry on this line; None if the line is torn or is no entry that `_line` would have written."""
    try:
        fields = parse_json(line)
        has_check = fields.pop("check", None) is not None  # older jobs have none
        entry = Entry(**fields)
        whole = entry.file == shard_name(entry.key) and _line(entry, has_check) == line
    except (ValueError, TypeError, AttributeError):
        return None
    is_typed = type(entry.bytes) is int and type(entry.sha256) is str and type(entry.report) is dict
    return entry if whole and is_typed else None
