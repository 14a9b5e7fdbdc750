"""Owns the faults that change what lies on disk: a file cut short, one flipped bit."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from faults.judge import FAILED, REFUSED, Fault, Verdict, judged, settle, told
from faults.runs import start
from faults.subjects import PACKED

Choose = Callable[[Path], Iterator[Path]]

NOT_OURS = ("README.md", "qtip-eval.json")
"""Files of a packed directory that a user may edit, and eval does: their bytes are nobody's promise (qtipcli.stages.card)."""


def truncated(fault: Fault) -> Verdict:
    """A shard of a job or of a packed model ends early."""
    victim = _victim(fault, lambda where: where.rglob("*.safetensors"))
    with victim.open("r+b") as file:
        file.truncate(fault.dice.randrange(victim.stat().st_size))
    return _settled(fault, victim)


def shard_bit(fault: Fault) -> Verdict:
    return _flipped(fault, lambda where: where.rglob("*.safetensors"))


def ledger_bit(fault: Fault) -> Verdict:
    """Of the ledger, and now and then of job.json."""
    name = fault.dice.choice(("ledger.jsonl", "ledger.jsonl", "job.json"))
    return _flipped(fault, lambda where: where.rglob(name))


def packed_bit(fault: Fault) -> Verdict:
    return _flipped(fault, lambda where: (path for path in (where / PACKED).rglob("*") if path.name not in NOT_OURS))


def _flipped(fault: Fault, choose: Choose) -> Verdict:
    victim = _victim(fault, choose)
    content = bytearray(victim.read_bytes())
    bit = fault.dice.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    victim.write_bytes(content)
    return _settled(fault, victim)


def _settled(fault: Fault, victim: Path) -> Verdict:
    """A command that needs a directory no more does not read it again: then the one that makes it must find the damage."""
    verdict = settle(fault)
    alone = f"{victim.relative_to(fault.where)} has other bytes"
    owner = fault.subject.owners.get(victim.parent.name)
    if verdict != (FAILED, alone) or owner is None:
        return verdict
    ended = start(owner, fault.where, fault.folder / "log").wait()
    if not ended.is_clear_refusal:
        return Verdict(FAILED, f"{alone}, and {owner[0]} does not say so: {told(ended)}")
    repaired = start((*owner, "--force"), fault.where, fault.folder / "log").wait()
    again = judged(fault)
    if repaired.status or again.outcome == FAILED:
        return Verdict(FAILED, f"{again.said} after {ended.message!r} and --force: {told(repaired)}")
    return Verdict(REFUSED, f"{ended.message} (by {owner[0]})")


def _victim(fault: Fault, choose: Choose) -> Path:
    """One of the files that are there when the command has finished, or, as often, when it was killed at a random moment."""
    fault.subject.prepare(fault.where)
    running = fault.start()
    if fault.dice.random() < 0.5:
        time.sleep(fault.moment())
        running.signal(signal.SIGKILL)
    running.wait()
    if not (files := _files(fault, choose)):
        fault.run()
        files = _files(fault, choose)
    return fault.dice.choice(files)


def _files(fault: Fault, choose: Choose) -> list[Path]:
    """Without the Hessians where the command does not read them."""
    files = sorted(path for path in choose(fault.where) if path.is_file() and path.stat().st_size)
    return [file for file in files if fault.subject.name != "pack" or file.parent.name != "hessians"]
