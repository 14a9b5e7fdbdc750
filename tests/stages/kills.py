"""Kills a quantize, allocate or finetune job with SIGKILL at random moments, gives the command again, compares the results.

    PYTHONPATH=src:kernels:tests python -m stages.kills --kills 100 [--what allocate]

Each time a job of the tiny model is started anew, killed after a delay drawn uniformly from the duration of a whole run, and
given again until it finishes. With --warm the commands run in forks of a process that has imported everything: an import is
nine tenths of such a run, and nothing can be damaged in it. Prints one JSON object: how many were killed, where they had got
to, and how many results differ from that of the run that nobody disturbed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from stages.tiny import FAST_OPTIONS, environment, save_model, save_text, snapshot

Start = Callable[[list[str], Path], int]
"""(arguments of qtip, directory to work in) -> pid of the process that does it."""


def start_process(arguments: list[str], where: Path) -> int:
    """As a user does it."""
    command = [sys.executable, "-m", "qtipcli", *arguments]
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, cwd=where, env=environment(), stdout=quiet, stderr=quiet).pid


def start_fork(arguments: list[str], where: Path) -> int:
    """In a child of this process, which must have one thread."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.chdir(where)
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        from qtipcli.cli.main import _run

        status = _run(arguments)
    finally:
        os._exit(status)


def exit_status(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def stage_reached(where: Path) -> str:
    """What a killed job had left on disk."""
    if (where / "out").exists():
        return "packed"
    if (where / "out.partial").exists():
        return "packing"
    for folder, what in (
        ("out.uniform.job", "quantizing the uniform model"), ("out.allocation.job", "quantizing the allocated model"),
        ("hessians.sensitivity-3inst", "measuring"),
    ):  # fmt: skip
        if (where / folder).exists():
            return what
    for folder, what in (("out.end.job", "tuning end to end"), ("out.blocks.job", "tuning blocks"), ("out.job", "quantizing")):
        if (where / folder).exists():
            return what
    return "calibrating" if (where / "hessians").exists() else "starting"


def command(what: str, start: Start, folder: Path) -> list[str]:
    """The arguments of the job that is killed, after what it needs was made in `folder`."""
    model, text = save_model("llama", folder / "model", max_shard_size="300KB"), save_text(folder / "text.txt")
    options = ["--data", str(text), "--out", "out", "--hessians", "hessians"]
    quantize = ["quantize", str(model), *FAST_OPTIONS, *options]
    if what == "quantize":
        return quantize
    if what == "allocate":
        (folder / "little.yaml").write_text("description: little is measured\nallocate: {windows: 2, judge_windows: 2}\n")
        return [*quantize, "--bits", "2.5", "--preset", str(folder / "little.yaml")]
    (folder / "packed").mkdir()
    if exit_status(start(quantize, folder / "packed")):
        raise SystemExit("the model to be tuned could not be quantized")
    tune = ["--blocks", "--end-to-end", "--samples", "16", "--heldout", "4", "--batch", "2", "--checkpoint-every", "2"]
    return ["finetune", str(folder / "packed" / "out"), "--data", str(text), "--context", "32", *tune, "--out", "out"]


def run(kills: int, start: Start, folder: Path, seed: int = 0, what: str = "quantize") -> dict[str, object]:
    """Kill `kills` jobs; see the head of this file."""
    arguments = command(what, start, folder)
    # The first run also compiles: the duration is that of a second one.
    for name in ("first", "oracle"):
        (folder / name).mkdir()
        started = time.perf_counter()
        if exit_status(start(arguments, folder / name)):
            raise SystemExit("the command failed before anything was killed")
        seconds = time.perf_counter() - started
    oracle = snapshot(folder / "oracle" / "out")
    expected = {file.name for file in (folder / "oracle").iterdir()}
    dice = random.Random(seed)
    reached: Counter[str] = Counter()
    differing = 0
    where = folder / "victim"
    while sum(reached.values()) < kills:
        where.mkdir()
        pid = start(arguments, where)
        time.sleep(dice.uniform(0, seconds))
        os.kill(pid, signal.SIGKILL)
        status = exit_status(pid)
        if status == -signal.SIGKILL:
            reached[stage_reached(where)] += 1
            status = exit_status(start(arguments, where))
        same = status == 0 and snapshot(where / "out") == oracle
        leftovers = {file.name for file in where.iterdir()} - expected
        if not same or leftovers:
            differing += 1
            shutil.copytree(where, folder / f"differs-{differing}", dirs_exist_ok=True)
        shutil.rmtree(where)
    return {"kills": kills, "differing": differing, "reached": dict(reached), "seconds": seconds}


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--warm", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--what", choices=("quantize", "allocate", "finetune"), default="quantize")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if asked.warm:
            warm_up(Path(folder) / "warm", asked.what)
        start = start_fork if asked.warm else start_process
        print(json.dumps(run(asked.kills, start, Path(folder), asked.seed, asked.what)))


def warm_up(folder: Path, what: str) -> None:
    """Import what a run imports. Torch must have one thread (environment()), or a fork would wait for threads it lacks."""
    import numba
    import torch

    from qtipcli.cli.main import _run

    torch.set_num_threads(1)
    # One kernel thread while this process works, so that forks find no lock held by a thread that they do not have.
    numba.config.NUMBA_NUM_THREADS, threads = 1, numba.config.NUMBA_NUM_THREADS
    model, text = save_model("llama", folder / "model"), save_text(folder / "text.txt")
    where = ["--data", str(text), "--out", str(folder / "out"), "--hessians", str(folder / "hessians")]
    with open(os.devnull, "w") as silence:  # noqa: PTH123
        sys.stdout, sys.stderr, kept = silence, silence, (sys.stdout, sys.stderr)
        try:
            _run(["quantize", str(model), *FAST_OPTIONS, *where])
            if what == "allocate":  # loads the code of a dozen trellises
                _run(["quantize", str(model), *FAST_OPTIONS, *where[:2], *where[4:], "--bits", "2.5", "--windows", "1",
                      "--out", str(folder / "allocated")])  # fmt: skip
            # Imports what tuning imports.
            _run(["finetune", str(folder / "out"), "--data", str(text), "--context", "32", "--samples", "4", "--heldout", "1",
                  "--blocks", "--end-to-end", "--out", str(folder / "tuned")])  # fmt: skip
        finally:
            sys.stdout, sys.stderr = kept
    numba.config.NUMBA_NUM_THREADS = threads
    from qtipcli_kernels.threads import _pool

    _pool.cache_clear()


if __name__ == "__main__":
    _main()
