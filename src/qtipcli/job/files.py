"""Owns how a file comes to be on disk: complete under its own name, or not at all.

The order is the whole trick: write to a temporary name in the same directory, fsync the file, rename it, fsync the directory.
A process that is killed leaves at most a temporary file, and `remove_temporary` knows those by their name. No torch here.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from qtipcli.errors import SettingsError, storage_error

TEMPORARY_SUFFIX = ".qtip-tmp"
_CHUNK_BYTES = 16 * 2**20  # long enough to stream at the disk's speed, short enough that a second Ctrl-C acts at once


def temporary_path(path: Path) -> Path:
    """The name under which `path` is written before it is complete; the same for every attempt, so that none pile up."""
    return path.with_name(f".{path.name}{TEMPORARY_SUFFIX}")


def check_target(path: Path) -> None:
    """Raise SettingsError or StorageError unless a file can be written to `path`; before a long measurement, not after it."""
    if not path.parent.is_dir():
        raise SettingsError(f"{path.parent} does not exist", "make the directory, or choose another")
    if path.is_dir():
        raise SettingsError(f"{path} is a directory", "give the name of a file")
    trial = temporary_path(path)
    try:
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise storage_error(error, path) from error


def is_temporary(path: Path) -> bool:
    """Whether `path` is named as a file that a killed process left half-written."""
    return path.name.startswith(".") and path.name.endswith(TEMPORARY_SUFFIX)


def remove_temporary(directory: Path) -> None:
    """Delete what killed processes left half-written in `directory`. The caller knows that no other process writes there."""
    try:
        for path in directory.iterdir():
            if is_temporary(path):
                path.unlink(missing_ok=True)
    except OSError as error:
        raise storage_error(error, directory) from error


def write_atomic(path: Path, chunks: Iterable[bytes | memoryview]) -> tuple[str, int]:
    """Write `chunks`, one after the other, to `path`, replacing what is there.

    Returns (sha256 of what was written as hex, its size in bytes).
    Raises StorageError if the file system refuses. After any exception no temporary file is left, and `path` is either as
    it was before or complete.
    """
    temporary = temporary_path(path)
    digest = hashlib.sha256()
    size = 0
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            for chunk in chunks:
                write_all(descriptor, chunk)
                digest.update(chunk)
                size += len(chunk)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.replace(path)
        sync_directory(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise storage_error(error, path) from error
        raise
    return digest.hexdigest(), size


def write_text_atomic(path: Path, text: str) -> str:
    """Write `text` as UTF-8 to `path`, complete or not at all; returns its sha256 as hex. Raises StorageError."""
    return write_atomic(Path(path), [text.encode()])[0]


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write every byte of `data` (a memoryview must be one of bytes): os.write may take fewer. Raises OSError."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view[:_CHUNK_BYTES]) :]


def sync_directory(directory: Path) -> None:
    """Make a rename, a creation or a deletion in `directory` survive a power cut. Raises OSError."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a directory, and say so with EINVAL
            raise
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Make all files and names in and below `directory` survive a power cut. Raises OSError."""
    for folder, _, names in os.walk(directory, topdown=False):
        for name in names:
            descriptor = os.open(Path(folder, name), os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_directory(Path(folder))


def make_directory(path: Path) -> bool:
    """Make `path` and its parents, each to survive a power cut; returns whether `path` was made here. Raises OSError."""
    if path.is_dir():
        return False
    make_directory(path.parent)
    try:
        path.mkdir()
    except FileExistsError:  # by another process, just now; or a file, and whoever wants a directory will say so
        return False
    sync_directory(path.parent)
    return True


def sha256_file(path: Path) -> str:
    """The sha256, as hex, of the file's content. Raises StorageError if it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise storage_error(error, path, "read") from error
