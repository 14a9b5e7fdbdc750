"""Owns the faults that come from outside: a second process with the same command, a clock that is wrong."""

from __future__ import annotations

import datetime
import os
import signal
import time

from faults.judge import FAILED, REFUSED, Fault, Verdict, is_orderly, judged, settle, told

YEAR_S = 365 * 24 * 3600


def two_at_once(fault: Fault) -> Verdict:
    """The same command twice, the second one at a random moment of the first: one does it, neither spoils it."""
    fault.subject.prepare(fault.where)
    first = fault.start(log="first")
    time.sleep(fault.dice.choice((0.0, fault.moment())))
    ended = [fault.start(log="second").wait(), first.wait()]
    for each in ended:
        if not is_orderly(each):
            return Verdict(FAILED, f"beside the same command: {told(each)}")
    if all(each.status for each in ended):
        return Verdict(FAILED, f"neither of two commands did it: {told(ended[0])}, {told(ended[1])}")
    if judged(fault).outcome == FAILED:
        return Verdict(FAILED, f"after both: {judged(fault).said}")
    verdict = settle(fault)
    refusals = [each.message for each in ended if each.status]
    return Verdict(REFUSED, refusals[0]) if refusals and verdict.outcome != FAILED else verdict


def clock_back(fault: Fault) -> Verdict:
    """A job is killed; its files bear times of all ages, some to come; and the command goes on years before or after it."""
    fault.subject.prepare(fault.where)
    running = fault.start()
    time.sleep(fault.moment())
    running.signal(signal.SIGKILL)
    running.wait()
    for path in sorted(fault.where.rglob("*")):
        when = fault.dice.choice((0.0, time.time() + fault.dice.uniform(-30, 30) * YEAR_S))
        os.utime(path, (when, when))
    offset = fault.dice.choice((-1, -10, -60, 30)) * YEAR_S
    return settle(fault, before=lambda: move_clock(offset))


def move_clock(offset_s: float) -> None:
    """Let this process see another time. The monotonic clock stays: no administrator can move that one."""
    now = time.time
    time.time = lambda: now() + offset_s
    time.time_ns = lambda: int(1e9 * (now() + offset_s))

    class Moved(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
            return cls.fromtimestamp(time.time(), tz)

    import qtipcli.job.directory

    class Module:
        datetime, UTC = Moved, datetime.UTC

    qtipcli.job.directory.datetime = Module
