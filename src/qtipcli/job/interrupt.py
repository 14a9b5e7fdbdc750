"""Owns what Ctrl-C and SIGTERM do to a job: the first asks it to stop at the next safe point, the second stops it at once.

with interruptible():
    for block in blocks:
        run.commit(...)
        checkpoint()
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from qtipcli.errors import StoppedError

_NOTICE = b"\nqtip: stopping after the step that is running; Ctrl-C again stops at once (what is finished is kept either way)\n"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)

# Signals belong to the process, so what was asked through them does too: the depth of `interruptible` and the signal received.
_depth = 0
_requested: signal.Signals | None = None


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Inside, the first SIGINT or SIGTERM only makes the next `checkpoint` raise; a second one raises KeyboardInterrupt.

    May be nested; leaving the outermost one is a checkpoint. Outside the main thread, where Python delivers no signals, it
    does nothing. Raises StoppedError.
    """
    global _depth, _requested
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if _depth == 0:
        _requested = None
    previous = {number: signal.signal(number, _request) for number in _SIGNALS}
    _depth += 1
    try:
        yield
        if _depth == 1:
            checkpoint()
    finally:
        _depth -= 1
        for number, handler in previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def checkpoint() -> None:
    """A safe point: everything finished is on disk. Raises StoppedError if the user has asked to stop."""
    if _depth and _requested is not None:
        cause = "Ctrl-C" if _requested is signal.SIGINT else _requested.name
        raise StoppedError(
            f"stopped by {cause}: everything finished so far is saved",
            "give the same command again to go on",
            exit_code=128 + _requested,
        )


def _request(number: int, frame: FrameType | None) -> None:
    global _requested
    if _requested is not None:
        raise KeyboardInterrupt
    _requested = signal.Signals(number)
    # Not print: the signal may have come in the middle of one, and a buffered stream cannot be entered twice.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.write(sys.stderr.fileno(), _NOTICE)
