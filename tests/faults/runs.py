"""Owns how a command is run so that something can be done to it: in a fork of a warm process, or in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from job.tiny import die_with_parent
from stages.tiny import environment

LONGEST_S = 150.0
"""A command that takes longer hangs: the slowest needs two seconds on an idle core."""

Hook = Callable[[], None]


class Ended(NamedTuple):
    """How a command ended: exit status (minus the signal that ended it), and all that it printed."""

    status: int
    text: str

    @property
    def message(self) -> str:
        """The first line of the refusal, as a user reads it."""
        lines = [line for line in self.text.splitlines() if line.startswith("qtip: ")]
        return lines[-1] if lines else ""

    @property
    def is_clear_refusal(self) -> bool:
        """One sentence of ours, a status that says failure, and no traceback."""
        return self.status in (1, 2, 130, 143) and bool(self.message) and "Traceback" not in self.text


class Running:
    """A command at work, whose output goes to a file."""

    def __init__(self, pid: int, log: Path) -> None:
        self.pid, self._log = pid, log

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)  # not waited for yet: the number is still this process's own

    def wait(self) -> Ended:
        """Until it has ended. One that hangs is killed, and its status is -SIGALRM."""
        deadline = time.monotonic() + LONGEST_S
        while True:
            pid, raw = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                status = os.waitstatus_to_exitcode(raw)
                break
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                status = -signal.SIGALRM
                break
            time.sleep(0.002)
        try:
            text = self._log.read_text(encoding="utf-8", errors="replace")
            self._log.unlink()
        except FileNotFoundError:  # killed before it could open it
            text = ""
        return Ended(status, text)


def start(arguments: Sequence[str], where: Path, log: Path, before: Hook | None = None, after: Hook | None = None) -> Running:
    """`qtip ARGUMENTS` in the directory `where`, in a fork of this process, which must have one thread.

    before, after: what the fork does besides. log: where its output goes; each command at work needs one of its own.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return Running(pid, log)
    status = 1
    try:
        die_with_parent()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o666)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
        os.chdir(where)
        status = _command(arguments, before, after)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _command(arguments: Sequence[str], before: Hook | None, after: Hook | None) -> int:
    from qtipcli.cli.main import _run

    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        if before is not None:
            before()
        status = _run([str(argument) for argument in arguments])
        if after is not None:
            after()
        return status
    except KeyboardInterrupt as error:
        if any("qtipcli" in frame.filename for frame in traceback.extract_tb(error.__traceback__)):
            traceback.print_exc()
        else:  # it came before the command had begun
            print("qtip: stopped by the harness's own start")
        return 130
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):  # what comes now comes too late
            signal.signal(number, signal.SIG_IGN)


def start_cold(arguments: Sequence[str], where: Path, log: Path) -> Running:
    """As a user does it: `python -m qtipcli ARGUMENTS`, imports and all."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "qtipcli", *map(str, arguments)], cwd=where, env=environment(), stdout=output, stderr=output,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # as above; Python then sets its own handler
        )  # fmt: skip
    process.returncode = 0  # waited for here, not by Popen
    return Running(process.pid, log)
