"""Owns the power cut: after every operation of a run, every kind of loss of what was not synced must leave a sound job.

A model check: the operations of one run are recorded, and for each prefix of them the disks that a power cut may leave are
built. On each of them what the ledger lists must be there to the last bit, what was said to be done must still be done, and a
packed model must be whole or not be one. On some of them, drawn at random, the command itself is given again.
"""

from __future__ import annotations

import dataclasses
import pickle
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from faults.disk_model import BYTES, NAMES, Disk, Op, Tree
from faults.judge import FAILED, SAME, Fault, Verdict, judged, settle, told
from faults.recorder import Recorder
from faults.subjects import PACKED
from qtipcli.errors import QtipError
from qtipcli.job.directory import RunDirectory
from qtipcli.stages.pack import INDEX_FILE

LOSSES = (("none", "lost"), ("all", "lost"), ("all", "zeros"), ("none", "kept"))
"""The four extremes (names, bytes), tried at every operation; one more is drawn there."""

AGAIN, AGAIN_QUICK = 3, 1
"""Disks on which the command is given again."""


def power_cut(fault: Fault) -> Verdict:
    # The lock's deletion is not synced, and the Hessians' directory is only read by who needs no more of them.
    fault = dataclasses.replace(fault, may_stay="hessians/lock")
    fault.subject.prepare(fault.where)
    before = tree_of(fault.where)
    record = fault.folder / "record"
    recorder = Recorder(fault.where, record)
    ended = fault.start(recorder.install, recorder.write).wait()
    if ended.status or (verdict := judged(fault)).outcome == FAILED:
        return Verdict(FAILED, f"recorded: {told(ended) if ended.status else verdict.said}")
    ops: list[Op] = pickle.loads(record.read_bytes())
    whole = tree_of(fault.where)
    shutil.rmtree(fault.where)
    losses = list(crashes(before, ops, fault.dice))
    if losses[-1][1] != whole:
        return Verdict(FAILED, f"the record is not what was done: {sorted(whole.items() ^ losses[-1][1].items())[0][0]}")
    drawn = set(fault.dice.sample(range(len(losses)), min(len(losses), AGAIN_QUICK if fault.quick else AGAIN)))
    checked: dict[Any, str] = {}
    for number, (at, tree) in enumerate(losses):
        if words := unsound(tree, ops[:at], fault.where, whole, checked):
            return Verdict(FAILED, f"after {_shown(ops, at)}: {words}")
        if number in drawn:
            write_tree(tree, fault.where)
            verdict = settle(fault)
            shutil.rmtree(fault.where)
            if verdict.outcome == FAILED:
                return Verdict(FAILED, f"after {_shown(ops, at)}: {verdict.said}")
    return Verdict(SAME, f"{len(ops)} operations, {len(losses)} different disks, the command again on {len(drawn)}")


def crashes(before: Tree, ops: list[Op], dice: random.Random) -> Iterator[tuple[int, Tree]]:
    """(number of operations done, a disk that a power cut may leave then); each disk with the first prefix that leaves it.

    The last one is what an orderly end leaves.
    """
    disk = Disk(before)
    seen: set[int] = set()
    said = 0
    for at in range(len(ops) + 1):
        if at:
            disk.do(ops[at - 1])
            said += ops[at - 1][0] in ("done", "forgotten", "ended")
        for how in (*LOSSES, (dice.choice(NAMES), dice.choice(BYTES))):
            tree = disk.left(*how, dice)
            mark = hash((said, frozenset(tree.items())))
            if mark not in seen:
                seen.add(mark)
                yield at, tree
    yield len(ops), disk.left("all", "kept", dice)


def unsound(tree: Tree, done: list[Op], where: Path, whole: Tree, checked: dict[Any, str]) -> str:
    """What is wrong with a disk after these operations; empty where nothing is.

    where: a place to write to. whole: what an orderly end leaves. checked: verdicts on jobs that were met before.
    """
    promised: dict[tuple[str, ...], set[str]] = {}
    for op in done:
        if op[0] == "done":
            promised.setdefault(op[1], set()).add(op[2])
        elif op[0] == "forgotten":
            promised.get(op[1], set()).discard(op[2])
    for job in sorted({path[:-1] for path in tree if path[-1] in ("job.json", "ledger.jsonl")} | promised.keys()):
        files = {path: content for path, content in tree.items() if path[:-1] == job}
        keys = frozenset(promised.get(job, ()))
        mark = job, keys, frozenset(files.items())
        if mark not in checked:
            checked[mark] = _unsound_job(files, job, where, keys)
        if checked[mark]:
            return checked[mark]
    has_ended = any(op[0] == "ended" for op in done)
    if (PACKED, INDEX_FILE) in tree or has_ended:
        for path, content in whole.items():
            if path[0] == PACKED and tree.get(path) != content:
                return f"{'/'.join(path)} is not whole in a packed model that {'is done' if has_ended else 'has an index'}"
    return ""


def _unsound_job(files: Tree, job: tuple[str, ...], where: Path, promised: frozenset[str]) -> str:
    name = "/".join(job)
    if (*job, "job.json") not in files:
        kept = [path[-1] for path in files if path[-1] == "ledger.jsonl"]
        return f"{name} has {kept[0]} and no job.json" if kept else f"{name} is lost" if promised else ""
    write_tree(files, where)
    try:
        found = RunDirectory.load(where.joinpath(*job))
        if damaged := found.damaged():
            return next(iter(damaged.values())).message
        lost = promised - set(found.keys())
        return f"{name}: {min(lost)} was done, and is not any more" if lost else ""
    except QtipError as error:
        return error.message
    finally:
        shutil.rmtree(where)


def tree_of(where: Path) -> Tree:
    """What lies below `where`."""
    return {path.relative_to(where).parts: None if path.is_dir() else path.read_bytes() for path in where.rglob("*")}


def write_tree(tree: Tree, where: Path) -> None:
    for path, content in sorted(tree.items()):
        target = where.joinpath(*path)
        (target if content is None else target.parent).mkdir(parents=True, exist_ok=True)
        if content is not None:
            target.write_bytes(content)
    where.mkdir(exist_ok=True)


def _shown(ops: list[Op], at: int) -> str:
    """The last operations before the cut."""
    return ", ".join(f"{op[0]} {'/'.join(op[1])}" for op in ops[max(0, at - 3) : at] if op[1] is not None)
