"""Measures what a second process gains: `qtip calibrate` and `qtip quantize` as one process and as two, one thread each.

    python -m stages.ranks_speed MODEL TEXT [--samples 192] [--context 256] [--worlds 1 2] [-- OPTIONS OF quantize]

The processes are forks of one that has imported everything (stages.ranks), so only the work is counted. Prints seconds on the
clock, the CPU seconds of the busiest process, the ratios of both to the first number of processes, and whether the bytes were
equal. The first ratio wants as many idle cores as there are processes; the second leaves out the time that processes wait for
one another, and bears other load on the machine.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from stages.ranks import Ended, Ranks
from stages.tiny import snapshot

LONGEST_S = 3600.0


def _run(ranks: Ranks, world: int, where: Path, *arguments: object) -> Ended:
    ended = ranks(world, where, *arguments, longest_s=LONGEST_S)
    if any(ended.statuses):
        raise SystemExit("\n".join(ended.err))
    return ended


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
    os.environ["NUMBA_NUM_THREADS"] = "1"  # OMP_NUM_THREADS is, too, in what Ranks starts
    found: dict[int, tuple[dict[str, Ended], dict[str, str]]] = {}
    with tempfile.TemporaryDirectory() as scratch, Ranks(Path(scratch)) as ranks:
        for world in asked.worlds:
            where, model = Path(scratch) / f"of {world}", asked.model.absolute()
            quantize = ("quantize", model, "--hessians", "hessians", "--out", "out", "--no-pack", *text, *asked.options)
            ended = {
                "calibrate": _run(ranks, world, where, "calibrate", model, "--out", "hessians", *text),
                "quantize": _run(ranks, world, where, *quantize),
            }
            found[world] = ended, _bytes(where)
    first, oracle = found[asked.worlds[0]]
    for world, (ended, digests) in found.items():
        for stage, end in ended.items():
            ratio, of_cpu = first[stage].wall_s / end.wall_s, max(first[stage].cpu_s) / max(end.cpu_s)
            clock = f"{end.wall_s:7.1f} s, busiest {max(end.cpu_s):7.1f} CPU s"
            print(f"{stage:10} {world} processes {clock}: ratio {ratio:.2f}, of CPU {of_cpu:.2f}")
        print(f"           {world} processes, bytes {'equal' if digests == oracle else 'DIFFERENT'}")


if __name__ == "__main__":
    main()
