"""Measures how true a dry run is: runs it, then the command itself, and prints predicted, measured and their ratio as JSON.

    PYTHONPATH=src:kernels:tests python -m stages.dry_run_check quantize MODEL --data FILE --bits 2 --out OUT

The words are those of the command. It is predicted twice, by the wall's clock and by that of the process, and then run, each in
a process of its own. CPU seconds are those of all threads; `cores` is how many of them the dry run and the run got, on the
average: where they differ, something else took the machine, and seconds of the wall compare to nothing. OUT and what lies
beside it must not be there.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WALL = "from qtipcli.cli.main import main; main()"

CPU = f"""
import time
time.perf_counter = time.process_time
from qtipcli.stages import own_process
own_process.age_seconds = time.process_time
{WALL}
"""
"""The same command with a clock that counts what this process gets of the processors."""


MEASURED = f"""
import json, os, sys, time
from qtipcli.cli import display
from qtipcli.stages.own_process import peak_bytes
begin, path = display.Display.begin, sys.argv.pop(1)
def noted(self, title, total, done=0):
    with open(path, "a") as file:
        print(json.dumps([title, time.monotonic(), time.process_time(), peak_bytes() / 1e6]), file=file)
    return begin(self, title, total, done)
display.Display.begin = noted
{WALL}
"""
"""The command itself, which writes to the file that is named first when each of its steps begins."""


def run(words: list[str]) -> dict[str, Any]:
    """See the head of this file."""
    cpu = json.loads(_run(CPU, [*words, "--dry-run", "--json"])[0])
    dry, dry_usage, dry_wall = _run(WALL, [*words, "--dry-run", "--json"])
    dry_cpu = dry_usage.ru_utime + dry_usage.ru_stime
    predicted = json.loads(dry)
    with tempfile.NamedTemporaryFile("r") as file:
        started = time.monotonic()
        _, usage, wall = _run(MEASURED, [file.name, *words, "--json"])
        begun = [json.loads(line) for line in file]
    taken = [wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6]
    row = {
        "command": f"qtip {' '.join(words)}",
        "peak_MB": _pair(predicted["peak_ram"] / 1e6, taken[2]),
        "cpu_s": _pair(cpu["total_seconds"], taken[1]),
        "wall_s": _pair(predicted["total_seconds"], wall),
        "cores": _pair(dry_cpu / dry_wall, taken[1] / wall),
        "dry_run_s": round(dry_wall, 1),
        "phases_MB": {phase: round(size / 1e6) for phase, size in predicted["ram"].items()},
        "steps_s": {step: [round(predicted["seconds"][step], 2), round(cpu["seconds"][step], 2)] for step in cpu["seconds"]},
        "measured_steps_s": _steps(begun, started, taken),
    }
    stored = _stored(words)
    if stored is not None and predicted["stored"] is not None:
        row["stored_bytes"] = _pair(predicted["stored"]["weights"], stored)
    return row


def _steps(begun: list[list[Any]], started: float, taken: list[float]) -> dict[str, list[float]]:
    """Step -> [wall seconds, CPU seconds, peak in MB so far]."""
    times = [["start", started, 0.0, 0.0], *begun, ["", started + taken[0], *taken[1:]]]
    found: dict[str, list[float]] = {}
    for (title, *before), (_, *after) in itertools.pairwise(times):
        spent = found.setdefault(title, [0.0, 0.0, 0.0])
        for place in range(2):
            spent[place] = round(spent[place] + after[place] - before[place], 2)
        spent[2] = round(after[2])
    return found


def _run(code: str, words: list[str]) -> tuple[str, Any, float]:
    """(what it printed, what it took of the machine, seconds)."""
    with tempfile.TemporaryFile("w+") as out:
        started = time.monotonic()
        child = subprocess.Popen([sys.executable, "-c", code, *words], stdout=out)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.monotonic() - started
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise SystemExit(f"qtip {' '.join(words)} ended with {child.returncode}")
        out.seek(0)
        return out.read(), usage, seconds


def _stored(words: list[str]) -> int | None:
    """Bytes of the weights in OUT."""
    if "--out" not in words:
        return None
    files = list(Path(words[words.index("--out") + 1]).glob("*.safetensors"))
    return sum(file.stat().st_size for file in files) if files else None


def _pair(predicted: float, measured: float) -> dict[str, float]:
    return {"predicted": predicted, "measured": measured, "ratio": round(predicted / measured, 3)}


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1:])))
