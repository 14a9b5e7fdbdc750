"""Units that fail in every way there is, for the supervisor's test: python -m gpu_report.broken_units FIRST."""

from __future__ import annotations

import os
import sys
import time

from gpu_report.supervisor import work
from gpu_report.units import Rows, Unit


def fine(value: int) -> Rows:
    """Two rows."""
    yield {"value": value}
    yield {"value": value + 1}


def raises() -> Rows:
    """A row, then an exception."""
    yield {"value": 10}
    raise ValueError("what went wrong")


def dies() -> Rows:
    """As a fatal error in a library ends a process."""
    yield {"value": 20}
    print("last words", file=sys.stderr, flush=True)
    os._exit(7)


def hangs() -> Rows:
    """A kernel that never ends."""
    yield {"value": 30}
    time.sleep(600)


def leaves() -> Rows:
    """A library that means to end the process."""
    yield {"value": 40}
    sys.exit("no such device")


UNITS = [
    Unit("a", "first", lambda: fine(0), 60),
    Unit("b", "raises", raises, 60),
    Unit("a", "second", lambda: fine(2), 60),
    Unit("c", "dies", dies, 60),
    Unit("c", "hangs", hangs, 1.0),
    Unit("d", "leaves", leaves, 60),
    Unit("e", "last", lambda: fine(50), 60),
]

if __name__ == "__main__":
    sys.exit(work(UNITS, int(sys.argv[1]), sys.stdout))
