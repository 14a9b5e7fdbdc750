"""Does faults to jobs of a tiny model, one after the other, and says how each ended.

    PYTHONPATH=src:kernels:tests python -m faults --count 500 --jobs 2 --json faults.json

Kind, subject and moment of fault N are drawn from --seed and N alone: `--seed S --only N` does that one again. A long run may
be done in pieces: with --add those that are in the JSON file are not done again, and --seconds ends a piece. Exit status 1 if
one failed. --break NAME breaks the product first (faults.breaks), to see the harness find it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from stages.kills import warm_up

from faults import breaks, kinds
from faults.judge import FAILED, Fault
from faults.report import merged, print_table
from faults.subjects import Subject, subjects


def draw(number: int, seed: int, of: list[str]) -> tuple[str, random.Random]:
    """(kind, dice for the rest) of fault `number`: kinds take turns in an order that is drawn anew for each round."""
    turn, place = divmod(number, len(of))
    order = random.Random(f"{seed} round {turn}").sample(of, len(of))
    return order[place], random.Random(f"{seed} fault {number}")


def do(number: int, asked: argparse.Namespace, known: dict[str, Subject], folder: Path) -> dict[str, Any]:
    """Fault `number`, in a directory that is removed afterwards unless it failed and --keep was said."""
    kind, dice = draw(number, asked.seed, asked.kinds)
    subject = known[dice.choice(kinds.SUBJECTS.get(kind, sorted(known)))]
    where = folder / f"fault-{number}"
    where.mkdir()
    started = time.monotonic()
    verdict = kinds.KINDS[kind](Fault(subject, where, dice, asked.quick))
    if verdict.outcome == FAILED and asked.keep:
        shutil.copytree(where, asked.keep / where.name, dirs_exist_ok=True)
    shutil.rmtree(where, ignore_errors=True)
    seconds = round(time.monotonic() - started, 2)
    return {"number": number, "kind": kind, "subject": subject.name, "seconds": seconds, **verdict._asdict()}


def share(worker: int, asked: argparse.Namespace, known: dict[str, Subject], folder: Path, out: Path) -> None:
    """Every --jobs-th fault, a line of JSON each."""
    with out.open("w", encoding="utf-8") as file:
        for number in asked.numbers[worker :: asked.jobs]:
            if time.monotonic() < asked.deadline:
                result = do(number, asked, known, folder)
                print(json.dumps(result), file=file, flush=True)
                said = f": {result['said']}" if result["outcome"] == FAILED or asked.only is not None else ""
                print(f"{number} {result['kind']}, {result['subject']}: {result['outcome']}{said}", flush=True)


def run(asked: argparse.Namespace, folder: Path) -> tuple[list[dict[str, Any]], bool]:
    """(what the faults came to, whether the harness itself held)."""
    with open(os.devnull, "w") as silence, contextlib.redirect_stdout(silence):  # noqa: PTH123
        warm_up(folder / "warm", "finetune")
    breaks.BREAKS[asked.broken]()
    known = subjects(folder)
    workers = [(_fork(worker, asked, known, folder, out), out) for worker in range(asked.jobs)
               for out in [folder / f"results-{worker}"]]  # fmt: skip
    results, are_whole = [], True
    for pid, out in workers:
        are_whole &= os.waitpid(pid, 0)[1] == 0
        results += [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    return sorted(results, key=lambda result: result["number"]), are_whole


def _fork(worker: int, asked: argparse.Namespace, known: dict[str, Subject], folder: Path, out: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        share(worker, asked, known, folder, out)
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="one fault of the run, by its number")
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=list(kinds.KINDS), help="some, with commas")
    parser.add_argument("--jobs", type=int, default=1, help="faults at a time")
    parser.add_argument("--folder", type=Path, help="where jobs are; in memory, as in /dev/shm, syncs take no time")
    parser.add_argument("--quick", action="store_true", help="leave out what takes long in a fault")
    parser.add_argument("--json", type=Path, help="counts and failures go here")
    parser.add_argument("--add", action="store_true", help="to those that are there, which are not done again")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no fault after these")
    parser.add_argument("--keep", type=Path, help="where directories of failed faults go")
    parser.add_argument("--break", dest="broken", choices=sorted(breaks.BREAKS), default="nothing")
    asked = parser.parse_args(arguments)
    asked.deadline = time.monotonic() + asked.seconds
    before = json.loads(asked.json.read_text(encoding="utf-8")) if asked.add and asked.json.exists() else None
    done = {fault["number"] for fault in before["faults"]} if before else set()
    wanted = range(asked.count) if asked.only is None else [asked.only]
    asked.numbers = [number for number in wanted if number not in done]
    with tempfile.TemporaryDirectory(prefix="qtip-faults-", dir=asked.folder) as name:
        folder = Path(name)
        folder.chmod(0o755)
        results, are_whole = run(asked, folder)
    print_table(results)
    if asked.json is not None:
        asked.json.write_text(json.dumps(merged(before, results, asked.seed), indent=1) + "\n", encoding="utf-8")
    if not are_whole:
        print("a worker of the harness itself failed: faults were left out", file=sys.stderr)
    return int(not are_whole or any(result["outcome"] == FAILED for result in results))


if __name__ == "__main__":
    sys.exit(main())
