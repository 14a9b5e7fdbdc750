"""Owns the faults that change what lies on disk: a file cut short, one flipped bit."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from faults.judge import Fault, Verdict, settle
from faults.subjects import PACKED

Choose = Callable[[Path], Iterator[Path]]

NOT_OURS = ("README.md", "qtip-eval.json")
"""Files of a packed directory that a user may edit, and eval does: their bytes are nobody's promise (qtipcli.stages.card)."""


def truncated(fault: Fault) -> Verdict:
    """A shard of a job or of a packed model ends early."""
    victim = _victim(fault, lambda where: where.rglob("*.safetensors"))
    with victim.open("r+b") as file:
        file.truncate(fault.dice.randrange(victim.stat().st_size))
    return settle(fault)


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
    return settle(fault)


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
    return sorted(path for path in choose(fault.where) if path.is_file() and path.stat().st_size)
