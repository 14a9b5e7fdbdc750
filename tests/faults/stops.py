"""Owns the faults that end a process: kill -9, SIGTERM and Ctrl-C at random moments."""

from __future__ import annotations

import signal
import time

from faults.judge import FAILED, SAME, TOO_LATE, Fault, Verdict, settle, told
from faults.runs import Running, start_cold

COLD_SHARE = 0.1
"""Of stopped commands that are processes of their own, imports and all: seconds each, most of them before a job begins."""

COLD_START_S = 6.0


def killed(fault: Fault) -> Verdict:
    """Up to three times in a row: what goes on after a kill may be killed too."""
    fault.subject.prepare(fault.where)
    hits = 0
    for _ in range(fault.dice.choice((1, 1, 2, 3))):
        running, moment = _start(fault)
        time.sleep(moment)
        running.signal(signal.SIGKILL)
        ended = running.wait()
        if ended.status not in (0, -signal.SIGKILL):
            return Verdict(FAILED, f"before the kill: {told(ended)}")
        hits += ended.status != 0
    return _marked(settle(fault), hits)


def terminated(fault: Fault) -> Verdict:
    """SIGTERM, as a batch system sends it before it kills."""
    return _asked_to_stop(fault, signal.SIGTERM)


def interrupted(fault: Fault) -> Verdict:
    """Ctrl-C, now and then a second one soon after."""
    return _asked_to_stop(fault, signal.SIGINT)


def _asked_to_stop(fault: Fault, number: signal.Signals) -> Verdict:
    fault.subject.prepare(fault.where)
    running, moment = _start(fault)
    time.sleep(moment)
    running.signal(number)
    if fault.dice.random() < 0.4:
        time.sleep(fault.dice.uniform(0, 0.2))
        running.signal(number)
    ended = running.wait()
    # Before a command works on its job nothing catches SIGTERM, nor Ctrl-C before Python has started; nothing can be lost then.
    is_orderly = ended.status == 0 or ended.is_clear_refusal or ended.status in (-signal.SIGTERM, -signal.SIGINT)
    if not is_orderly or "Traceback" in ended.text:
        return Verdict(FAILED, f"stopped by {number.name}: {told(ended)}")
    return _marked(settle(fault), ended.status)


def _marked(verdict: Verdict, hits: int) -> Verdict:
    """Whether the command had ended before it could be stopped, which says little, is part of the verdict."""
    return Verdict(SAME, TOO_LATE) if verdict.outcome == SAME and not hits else verdict


def _start(fault: Fault) -> tuple[Running, float]:
    """(the command at work, the moment at which it is to be stopped)."""
    if fault.quick or fault.dice.random() >= COLD_SHARE:
        return fault.start(), fault.moment()
    # Not in the interpreter's own start: what Python says there is not ours.
    moment = fault.dice.uniform(0.3, COLD_START_S + fault.subject.seconds)
    return start_cold(fault.subject.arguments, fault.where, fault.folder / "log"), moment
