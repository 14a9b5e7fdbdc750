"""Measures what a second process gains: `qtip calibrate` and `qtip quantize` as one process and as two, one thread each.

    python -m stages.ranks_speed MODEL TEXT [--samples 192] [--context 256] [--worlds 1 2] [-- OPTIONS OF quantize]

Prints wall-clock seconds of whole commands through torchrun, start-up included, the ratios to the first number of processes,
and whether the bytes were equal. Wants as many idle cores as there are processes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from stages.tiny import environment, snapshot


def _seconds(world: int, where: Path, *arguments: object) -> float:
    """Of one command of qtip as `world` processes."""
    started = time.monotonic()
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--nproc_per_node", str(world), "-m", "qtipcli"]
    surroundings = environment() | {"ACCELERATE_USE_CPU": "true", "NUMBA_NUM_THREADS": "1"}
    subprocess.run([*torchrun, *map(str, arguments)], cwd=where, env=surroundings, check=True)
    return time.monotonic() - started


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
    found: dict[int, tuple[dict[str, float], dict[str, str]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for world in asked.worlds:
            where = Path(scratch) / str(world)
            where.mkdir()
            model = asked.model.absolute()
            spent = {"calibrate": _seconds(world, where, "calibrate", model, "--out", "hessians", *text)}
            quantize = ("quantize", model, "--hessians", "hessians", "--out", "out", "--no-pack", *text, *asked.options)
            spent["quantize"] = _seconds(world, where, *quantize)
            found[world] = spent, _bytes(where)
    first, oracle = found[asked.worlds[0]]
    for world, (spent, digests) in found.items():
        for stage, seconds in spent.items():
            print(f"{stage:10} {world} processes {seconds:7.1f} s  ratio {first[stage] / seconds:.2f}")
        print(f"           {world} processes, bytes {'equal' if digests == oracle else 'DIFFERENT'}")


if __name__ == "__main__":
    main()
