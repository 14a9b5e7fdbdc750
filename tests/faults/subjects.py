"""Owns the commands that faults are done to, and what an undisturbed run of each leaves: the oracle."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.tiny import FAST_OPTIONS, save_model, save_text

from faults.runs import start

Snapshot = dict[str, str]

PACKED = "out"
"""Where every command puts what it packs."""


@dataclass(frozen=True)
class Subject:
    """One command.

    arguments: of qtip. given: what must be in its directory beforehand; None for nothing. repair: the commands that the hints
    of its refusals name. expected: what it leaves; oracle: where that lies. seconds: of a whole run.
    owners: directory that this command reads only as long as it needs it -> the command that makes it.
    """

    name: str
    arguments: tuple[str, ...]
    given: Path | None = None
    repair: tuple[tuple[str, ...], ...] = ()
    expected: Snapshot = field(default_factory=dict)
    oracle: Path = Path()
    owners: dict[str, tuple[str, ...]] = field(default_factory=dict)
    seconds: float = 0.0

    def prepare(self, where: Path) -> None:
        """Make its directory as it is before the command is first given."""
        if self.given is not None:
            shutil.copytree(self.given, where, dirs_exist_ok=True)
        else:
            where.mkdir(parents=True, exist_ok=True)


def snapshot(where: Path) -> Snapshot:
    """Path below `where` -> sha256 of a file's content, "directory" for a directory.

    Of job.json what does not tell the time; of a ledger the lines in sorted order: what was done again comes last in it.
    """
    found = {}
    for path in sorted(where.rglob("*")):
        if path.is_dir():
            found[str(path.relative_to(where))] = "directory"
            continue
        content = path.read_bytes()
        if path.name == "job.json":
            content = _timeless(content)
        if path.name == "ledger.jsonl":
            content = b"".join(sorted(content.splitlines(keepends=True)))
        found[str(path.relative_to(where))] = hashlib.sha256(content).hexdigest()
    return found


def _timeless(content: bytes) -> bytes:
    try:
        job: dict[str, Any] = json.loads(content)
        return json.dumps({name: value for name, value in job.items() if name not in ("created", "check")}).encode()
    except (ValueError, AttributeError):
        return content


def different(found: Snapshot, expected: Snapshot) -> str:
    """In words, how they differ; empty where they do not."""
    words = [f"{name} is missing" for name in expected.keys() - found.keys()]
    words += [f"{name} is left over" for name in found.keys() - expected.keys()]
    words += [f"{name} has other bytes" for name in found.keys() & expected.keys() if found[name] != expected[name]]
    return "; ".join(sorted(words)[:4])


def undisturbed(name: str, arguments: tuple[str, ...], folder: Path, given: Path | None = None, **repair: Any) -> Subject:
    """The subject with its oracle: the command is run twice, and both runs must leave the same.

    Raises SystemExit where it fails, or where they do not.
    """
    subject = Subject(name, arguments, given, **repair)
    snapshots, seconds = [], 0.0
    for number in range(2):
        where = folder / f"{name}-{number}"
        subject.prepare(where)
        started = time.perf_counter()
        ended = start(arguments, where, folder / "log").wait()
        seconds = time.perf_counter() - started
        if ended.status:
            raise SystemExit(f"{name} failed before anything was done to it:\n{ended.text}")
        snapshots.append(snapshot(where))
    if words := different(*snapshots):
        raise SystemExit(f"two undisturbed runs of {name} differ: {words}")
    return Subject(name, arguments, given, expected=snapshots[0], oracle=where, seconds=seconds, **repair)


def subjects(folder: Path) -> dict[str, Subject]:
    """Name -> subject, of a tiny model that is made in `folder`."""
    model = str(save_model("llama", folder / "model", max_shard_size="300KB"))
    text = ("--data", str(save_text(folder / "text.txt")))
    calibrate = ("calibrate", model, *FAST_OPTIONS[2:], *text, "--out", "hessians")
    whole = ("quantize", model, *FAST_OPTIONS, *text, "--hessians", "hessians", "--out", PACKED)
    rounding, packing = (*whole, "--no-pack"), ("pack", model, f"{PACKED}.job", "--out", PACKED)

    def forced(*commands: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
        return tuple((*command, "--force") for command in commands)

    found = [undisturbed("calibrate", calibrate, folder, repair=forced(calibrate))]
    found.append(
        undisturbed(
            "quantize", rounding, folder, folder / "calibrate-0", repair=forced(rounding), owners={"hessians": calibrate}
        )
    )
    found.append(
        undisturbed(
            "pack", packing, folder, folder / "quantize-0", repair=forced(rounding, packing), owners={"out.job": rounding}
        )
    )
    tune = ("finetune", str(folder / "pack-0" / PACKED), *text, "--context", "32", "--blocks", "--end-to-end", "--out", PACKED)
    tune += ("--samples", "8", "--heldout", "2", "--batch", "2", "--checkpoint-every", "1")
    found.append(undisturbed("finetune", tune, folder, repair=forced(tune)))
    found.append(undisturbed("pipeline", whole, folder, repair=forced(whole), owners={"hessians": calibrate}))
    return {subject.name: subject for subject in found}
