"""Owns the errors that a person is meant to read: each names the thing, the fact and the remedy.

Everything below `cli` raises these; only `cli.main()` turns one into a line and an exit status. A subclass exists only where
a caller must tell it from the others. No torch here: the command line imports this file at start-up.
"""

from __future__ import annotations

import errno
import os


class QtipError(Exception):
    """A failure with a remedy.

    Args:
        message: the thing and the fact, in one sentence without a full stop.
        hint: the remedy, in one sentence without a full stop; empty where there is none to give.
        exit_code: the process's exit status.
    """

    def __init__(self, message: str, hint: str = "", exit_code: int = 1) -> None:
        self.message = one_line(message)
        self.hint = one_line(hint)
        self.exit_code = exit_code
        super().__init__(self.message, self.hint, exit_code)  # all three, so that it survives a copy across processes

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class SettingsError(QtipError):
    """What was asked for cannot be done as asked: a value out of range, a path in the way. Exit status 2, as for bad usage."""

    def __init__(self, message: str, hint: str = "", exit_code: int = 2) -> None:
        super().__init__(message, hint, exit_code)


class MismatchError(QtipError):
    """The run directory holds a job of another stage, model, data or settings."""


class CorruptError(QtipError):
    """A file is not what was written: truncated, changed, missing, or not in its format."""


class BusyError(QtipError):
    """Another process holds the run directory."""


class StorageError(QtipError):
    """The file system refused: full, read-only, not permitted, not there. Its cause is the OSError."""


class StoppedError(QtipError):
    """The user asked to stop (Ctrl-C or SIGTERM) and the work stopped at a safe point. Exit status 128 + the signal."""

    def __init__(self, message: str, hint: str = "", exit_code: int = 130) -> None:
        super().__init__(message, hint, exit_code)


class PeerError(QtipError):
    """Another process of the same job failed or stopped, and says so itself: nothing is printed. Exit status as the other's."""


LONGEST = 2000
"""Characters of a message: eight differences of settings take 1300."""


def one_line(text: str) -> str:
    """The text, at most LONGEST characters of it, with what is not printable escaped.

    Names in a model's files may hold line ends, or move a terminal's cursor.
    """
    if len(text) > LONGEST:
        text = f"{text[: LONGEST - 400]} ... {text[-300:]}"
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def first_line(error: BaseException) -> str:
    """What another library says, as a part of a sentence; its kind where it says nothing, or only names something."""
    text = str(error).strip().split("\n")[0].rstrip(".")
    return text if " " in text else f"{type(error).__name__} {text}".rstrip()


_RETRY = "then give the same command again: a job goes on from its last finished step"

# errno -> (sentence with ACTION and PATH in it, remedy).
_STORAGE_FACTS: dict[int, tuple[str, str]] = {
    errno.ENOSPC: ("cannot ACTION PATH: the disk is full", f"free some space, {_RETRY}"),
    errno.EDQUOT: ("cannot ACTION PATH: your disk quota is used up", f"free some space, {_RETRY}"),
    errno.EFBIG: ("cannot ACTION PATH: larger than the file system or ulimit -f allows", f"raise the limit, {_RETRY}"),
    errno.EACCES: ("cannot ACTION PATH: no permission", "change the permissions, or choose another directory"),
    errno.EPERM: ("cannot ACTION PATH: not permitted", "change the owner or attributes, or choose another directory"),
    errno.EROFS: ("cannot ACTION PATH: the file system is read-only", "choose a directory on another file system"),
    errno.ENOENT: ("PATH does not exist", "check the path"),
    errno.ENOTDIR: ("cannot ACTION PATH: a part of it is a file, not a directory", "choose another path"),
    errno.EEXIST: ("PATH is in the way: it exists already", "move it, or choose another path"),
    errno.EISDIR: ("PATH is a directory where a file was expected", "check the path"),
    errno.ENAMETOOLONG: ("cannot ACTION PATH: the name is too long for the file system", "choose a shorter path"),
    errno.EMFILE: ("cannot ACTION PATH: too many files are open", "raise ulimit -n"),
    errno.ENOLCK: ("PATH cannot be locked: its file system has no locks", "choose a directory on a local disk"),
    errno.EOPNOTSUPP: ("PATH cannot be locked: its file system has no locks", "choose a directory on a local disk"),
    errno.EIO: ("cannot ACTION PATH: the device reports an input/output error", "check the disk and the kernel's log"),
}


def storage_error(error: OSError, path: str | os.PathLike[str], action: str = "write") -> StorageError:
    """The StorageError that says in words what `error` means for `path`; raise it `from error`.

    Args:
        error: what the operating system raised.
        path: the file or directory that the user knows (not a temporary name).
        action: "read" or "write".
    """
    unknown = (f"cannot ACTION PATH: {error.strerror or error}", "")
    sentence, hint = _STORAGE_FACTS.get(error.errno or 0, unknown)
    return StorageError(sentence.replace("ACTION", action).replace("PATH", os.fspath(path)), hint)
