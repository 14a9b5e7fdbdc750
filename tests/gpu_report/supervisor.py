"""Owns the run of the units: in a worker process that is replaced when a unit breaks it, the report written after each row.

A CUDA error can leave a process unable to run anything more, and a kernel can hang: so the units run elsewhere than the report
is kept. A worker says what it does as lines of JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import IO, Any

from gpu_report.units import Unit

START_SECONDS = 60.0
"""What a worker may take before its first unit begins, and between two."""

STDERR_LINES = 30


def work(units: Sequence[Unit], first: int, out: IO[str]) -> int:
    """In the worker: run units from number `first` on, each a few lines of JSON on `out`. Returns 1 where it is past use."""
    for number, unit in enumerate(units[first:], first):
        _say(out, unit=number, event="begin")
        try:
            for row in unit.run():
                _say(out, unit=number, event="row", row=row)
        except BaseException as error:  # also a SystemExit that a library raised: all of it belongs into the report
            _say(out, unit=number, event="failed", text="".join(traceback.format_exception(error))[-6000:])
            if not _gpu_answers():
                return 1
        _say(out, unit=number, event="end")
    return 0


def _say(out: IO[str], **what: Any) -> None:
    out.write(json.dumps(what, default=str) + "\n")
    out.flush()


def _gpu_answers() -> bool:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return int(torch.ones(1, device="cuda").sum()) == 1
    except Exception:  # whatever it is, this process is of no more use
        return False


def supervise(
    units: Sequence[Unit], command: Sequence[str], report: dict[str, Any], write: Callable[[], None], budget: float
) -> None:
    """Run all units in workers and fill report["sections"] and report["not_run"]; `write` is called after each change.

    command: starts a worker; the number of its first unit is added. budget: seconds for everything; what does not fit into them
    is in "not_run".
    """
    stop = time.monotonic() + budget
    first = 0
    while first < len(units) and time.monotonic() < stop:
        first = _Worker(units, first, command, report, write).run(stop)
    report["not_run"] = [f"{unit.section}: {unit.name}" for unit in units[first:]]
    write()


class _Worker:
    """One worker process, from unit `first` on, and where it is. number: of the unit that runs (`begun`) or is to come."""

    def __init__(
        self, units: Sequence[Unit], first: int, command: Sequence[str], report: dict[str, Any], write: Callable[[], None]
    ) -> None:
        self.units, self.first, self.command, self.report, self.write = units, first, [*command, str(first)], report, write
        self.number, self.begun = first, False
        self.limit = time.monotonic() + START_SECONDS

    def run(self, stop: float) -> int:
        """Follow it until it ends or must be ended, at `stop` at the latest; returns the number of the next unit to run."""
        lines: queue.Queue[str | None] = queue.Queue()
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
            process = subprocess.Popen(self.command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True)
            threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
            try:
                while line := self._next_line(lines, stop):
                    self._hear(json.loads(line))
                    self.write()
                if line == "":
                    return self.number + 1
                process.wait()
                if not self.begun and self.number > self.first:
                    return self.number
                errors.seek(0)
                tail = "".join(errors.readlines()[-STDERR_LINES:])
                if not self._has_failed():
                    self._fail(f"the worker ended with status {process.returncode}:\n{tail}")
                return self.number + 1
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                self.write()

    def _next_line(self, lines: queue.Queue[str | None], stop: float) -> str | None:
        """What the worker says next; None where it has ended, "" where its time is up."""
        try:
            return lines.get(timeout=max(0.0, min(self.limit, stop) - time.monotonic()))
        except queue.Empty:
            whole = "the time for everything was up" if time.monotonic() >= stop else "it took longer than it may"
            self._fail(f"ended after {time.monotonic() - self.limit + self._allowed():.0f} s: {whole}")
            return ""

    def _allowed(self) -> float:
        return self.units[self.number].limit if self.begun else START_SECONDS

    def _hear(self, said: dict[str, Any]) -> None:
        self.number, event = said["unit"], said["event"]
        unit, section = self.units[self.number], self._section()
        if event == "begin":
            self.begun, self.limit = True, time.monotonic() + unit.limit
            print(f"{unit.section}: {unit.name}", file=sys.stderr, flush=True)
        elif event == "row":
            section["rows"].append(said["row"])
        elif event == "failed":
            self._fail(said["text"])
        else:
            section["seconds"] = round(section["seconds"] + time.monotonic() - self.limit + unit.limit, 2)
            self.number, self.begun, self.limit = self.number + 1, False, time.monotonic() + START_SECONDS

    def _section(self) -> dict[str, Any]:
        return self.report["sections"].setdefault(self.units[self.number].section, {"rows": [], "failed": [], "seconds": 0.0})

    def _fail(self, text: str) -> None:
        unit = self.units[self.number]
        self._section()["failed"].append({"unit": unit.name, "text": text})
        print(f"{unit.section}: {unit.name} FAILED: {text.strip().splitlines()[-1]}", file=sys.stderr, flush=True)

    def _has_failed(self) -> bool:
        return any(failure["unit"] == self.units[self.number].name for failure in self._section()["failed"])


def _read(stream: IO[str], lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)
