"""Owns the lock of a run directory: one process at a time may write there, and a dead one never stands in the way.

The kernel holds the lock (flock), so it ends with its process, even under kill -9. The file's text is for people only.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from pathlib import Path

from qtipcli.errors import BusyError, storage_error

# The kernel frees the memory of a killed process before its locks, which takes a moment for a large model: the same command
# given right after kill -9 must not be told that the directory is busy.
_PATIENCE_S = 1.0
_POLL_S = 0.02
_TEXT_START = "process "


class Lock:
    """An exclusive lock held through the file `path`, from construction to `release`.

    place: what it guards, for the message; None is the directory it lies in.
    Raises BusyError, naming the holder, if another process (or another Lock of this one) has it; StorageError if the file
    cannot be written.
    """

    def __init__(self, path: Path, place: Path | None = None) -> None:
        self.path, self._place = path, place or path.parent
        deadline = time.monotonic() + _PATIENCE_S
        while (descriptor := self._attempt()) is None:
            if time.monotonic() > deadline:
                raise self._busy()
            time.sleep(_POLL_S)
        self._descriptor: int | None = descriptor

    @staticmethod
    def wrote(text: bytes) -> bool:
        """Whether a lock file with this content is ours, even if a crash cut the text short or left zeros in its place."""
        start = _TEXT_START.encode()
        text = text.strip(b"\0")
        return text[: len(start)] == start[: len(text)]

    def _attempt(self) -> int | None:
        """The descriptor that holds the lock, or None while somebody else has it."""
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The holder before us deletes the file when it is done: a lock on a deleted file protects nothing.
                if os.fstat(descriptor).st_nlink == 0:
                    raise BlockingIOError
                with contextlib.suppress(OSError):  # a full disk keeps nobody from holding the lock
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, f"{_TEXT_START}{os.getpid()} on host {socket.gethostname()}\n".encode(), 0)
            except BaseException:
                os.close(descriptor)
                raise
        except BlockingIOError:
            return None
        except OSError as error:
            raise storage_error(error, self.path) from error
        return descriptor

    def _busy(self) -> BusyError:
        try:
            holder = self.path.read_text(errors="replace").strip()
        except OSError:
            holder = ""
        return BusyError(
            f"another qtip ({holder or 'process unknown'}) works in {self._place}",
            "wait until it is done, stop it, or choose another directory",
        )

    def release(self) -> None:
        """Let the next process in. Harmless when it is already released."""
        if self._descriptor is None:
            return
        with contextlib.suppress(OSError):  # a file that stays is an empty promise, not a lock
            self.path.unlink()
        os.close(self._descriptor)
        self._descriptor = None
