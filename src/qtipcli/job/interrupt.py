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
_notice = True
_at_once = 0  # the number of the signal that ended the command where it was


@contextlib.contextmanager
def interruptible(notice: bool = True) -> Iterator[None]:
    """Inside, the first SIGINT or SIGTERM only makes the next `checkpoint` raise; a second one raises KeyboardInterrupt.

    May be nested; leaving the outermost one is a checkpoint. Outside the main thread, where Python delivers no signals, it
    does nothing. notice: say at once that the signal was heard. Raises StoppedError.
    """
    global _depth, _requested, _notice
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if _depth == 0:
        _requested, _notice = None, notice
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
    if number := requested():
        raise stopped(number)


def requested() -> int:
    """The number of the signal by which the user has asked to stop; 0 if there was none."""
    return int(_requested) if _depth and _requested is not None else 0


def stopped(number: int) -> StoppedError:
    """The error that says that the job has stopped because of the signal `number`."""
    return StoppedError(
        f"stopped by {_cause(number)}: everything finished so far is saved",
        "give the same command again to go on",
        exit_code=128 + number,
    )


def stopped_at_once(number: int = signal.SIGINT) -> StoppedError:
    """The error that says that the signal `number` has ended the command where it was, and not at a safe point."""
    fact = f"stopped by {_cause(number)}; a job keeps what is finished"
    return StoppedError(fact, "the same command goes on with it", exit_code=128 + number)


def _cause(number: int) -> str:
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


@contextlib.contextmanager
def stopping_in_words() -> Iterator[None]:
    """Inside, a Ctrl-C that ends the command where it is becomes a StoppedError, whatever it was on its way.

    It may come while native code calls back into Python, which then fails with an error of its own that says nothing of it.
    """
    global _at_once
    _at_once = 0
    in_main = threading.current_thread() is threading.main_thread()
    is_ours = in_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_ours:
        signal.signal(signal.SIGINT, _stop_at_once)
    try:
        yield
    except KeyboardInterrupt:
        raise stopped_at_once(_at_once or signal.SIGINT) from None
    except Exception as error:
        if _at_once and not isinstance(error, StoppedError):
            raise stopped_at_once(_at_once) from error
        raise
    finally:
        if is_ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _stop_at_once(number: int, frame: FrameType | None) -> None:
    global _at_once
    _at_once = number
    raise KeyboardInterrupt


def _request(number: int, frame: FrameType | None) -> None:
    global _requested
    if _requested is not None:
        _stop_at_once(number, frame)
    _requested = signal.Signals(number)
    if not _notice:
        return
    # Not print: the signal may have come in the middle of one, and a buffered stream cannot be entered twice.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.write(sys.stderr.fileno(), _NOTICE)
