"""Measures what a second process gains: `qtip calibrate` and `qtip quantize` as one process and as two, one thread each.

    python -m stages.ranks_speed MODEL TEXT [--samples 192] [--context 256] [--worlds 1 2] [-- OPTIONS OF quantize]

Prints wall-clock seconds of whole commands, start-up included, the CPU seconds of the busiest process, the ratios of both to
the first number of processes, and whether the bytes were equal. The first ratio wants as many idle cores as there are
processes; the second is that of the work, without the time that processes wait for one another, and bears other load.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from stages.ranks import free_port, launched
from stages.tiny import environment, snapshot


class Spent(NamedTuple):
    """By one command: seconds on the clock, and CPU seconds of the process that worked longest."""

    wall: float
    cpu: float


def _spent(world: int, where: Path, *arguments: object) -> Spent:
    """Of one command of qtip as `world` processes of one thread."""
    started, port = time.monotonic(), free_port()
    command = [sys.executable, "-m", "qtipcli", *map(str, arguments)]
    pids = []
    for rank in range(world):
        surroundings = environment() | {"NUMBA_NUM_THREADS": "1"}
        if world > 1:
            surroundings |= launched(rank, world, port) | {"TORCHELASTIC_USE_AGENT_STORE": "False"}
        pids.append(subprocess.Popen(command, cwd=where, env=surroundings).pid)
    ends = [os.wait4(pid, 0) for pid in pids]
    if any(status for _, status, _ in ends):
        raise SystemExit("a process failed")
    return Spent(time.monotonic() - started, max(usage.ru_utime + usage.ru_stime for _, _, usage in ends))


def _bytes(where: Path) -> dict[str, str]:
    """Digests of what a job finished; ledgers and job.json hold clock times."""
    return {name: digest for name, digest in snapshot(where).items() if name.endswith(".safetensors")}


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--samples", type=int, default=192)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("options", nargs="*")
    asked = parser.parse_args()
    text = ("--data", asked.text.absolute(), "--samples", asked.samples, "--context", asked.context)
    found: dict[int, tuple[dict[str, Spent], dict[str, str]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for world in asked.worlds:
            where = Path(scratch) / str(world)
            where.mkdir()
            model = asked.model.absolute()
            spent = {"calibrate": _spent(world, where, "calibrate", model, "--out", "hessians", *text)}
            quantize = ("quantize", model, "--hessians", "hessians", "--out", "out", "--no-pack", *text, *asked.options)
            spent["quantize"] = _spent(world, where, *quantize)
            found[world] = spent, _bytes(where)
    first, oracle = found[asked.worlds[0]]
    for world, (spent, digests) in found.items():
        for stage, (wall, cpu) in spent.items():
            ratios = f"ratio {first[stage].wall / wall:.2f}, of CPU {first[stage].cpu / cpu:.2f}"
            print(f"{stage:10} {world} processes {wall:7.1f} s, busiest {cpu:7.1f} CPU s: {ratios}")
        print(f"           {world} processes, bytes {'equal' if digests == oracle else 'DIFFERENT'}")


if __name__ == "__main__":
    main()
