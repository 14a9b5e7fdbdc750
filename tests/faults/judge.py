"""Owns the verdict on a fault: the same bytes as an undisturbed run, a clear refusal, or a failure with what happened."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from faults.runs import Ended, Hook, Running, start
from faults.subjects import Subject, different, snapshot

SAME, REFUSED, FAILED = "same bytes", "clear refusal", "FAILED"

TOO_LATE = "the command had ended before"
"""What is said of a fault that came when there was nothing left to be disturbed."""


class Verdict(NamedTuple):
    """outcome: SAME, REFUSED or FAILED. said: the refusal, or what happened."""

    outcome: str
    said: str = ""


@dataclass(frozen=True)
class Fault:
    """What a kind of fault works with: its subject, a directory of its own, dice that its seed and number decide.

    where: the subject's working directory, not made yet. folder: for whatever else; both are removed afterwards.
    quick: whether this is the short run. may_stay: a file that is no failure if it is left over.
    """

    subject: Subject
    folder: Path
    dice: random.Random
    quick: bool = False
    may_stay: str = ""

    @property
    def where(self) -> Path:
        return self.folder / "where"

    def start(self, before: Hook | None = None, after: Hook | None = None, log: str = "log") -> Running:
        """The subject's command, in its directory."""
        return start(self.subject.arguments, self.where, self.folder / log, before, after)

    def run(self, before: Hook | None = None) -> Ended:
        return self.start(before).wait()

    def moment(self) -> float:
        """Seconds from the start, within a whole run."""
        return self.dice.uniform(0, self.subject.seconds)


def is_orderly(ended: Ended) -> bool:
    """Whether a command that was disturbed ended as one may."""
    return ended.status == 0 or ended.is_clear_refusal


def settle(fault: Fault, remedy: Callable[[], None] | None = None, before: Hook | None = None) -> Verdict:
    """Give the same command again, and after a refusal what its hint says; and judge what there is in the end.

    remedy: what a user does whose command was refused, before giving it again. None: the repair commands of the subject.
    before: done in the process of the command.
    """
    ended = fault.run(before)
    if ended.status == 0:
        return judged(fault)
    if not ended.is_clear_refusal:
        return Verdict(FAILED, f"the command again: {told(ended)}")
    refusal = ended.message
    commands: Sequence[tuple[str, ...]] = [fault.subject.arguments]
    if remedy is None:
        if "--force" not in ended.text:
            return Verdict(FAILED, f"the refusal names no remedy: {told(ended)}")
        commands = fault.subject.repair
    else:
        remedy()
    for arguments in commands:
        ended = start(arguments, fault.where, fault.folder / "log", before).wait()
        if ended.status:
            return Verdict(FAILED, f"after {refusal!r} its remedy fails: {told(ended)}")
    verdict = judged(fault)
    return Verdict(REFUSED, refusal) if verdict.outcome == SAME else Verdict(FAILED, f"{verdict.said} after {refusal!r}")


def judged(fault: Fault) -> Verdict:
    """What lies there now, against what an undisturbed run leaves."""
    found = snapshot(fault.where)
    if fault.may_stay not in fault.subject.expected:
        found.pop(fault.may_stay, None)
    words = different(found, fault.subject.expected)
    return Verdict(FAILED, words) if words else Verdict(SAME)


def told(ended: Ended) -> str:
    """The end of what a command printed, with its status."""
    return f"status {ended.status}, {ended.text.strip()[-1500:]!r}"
