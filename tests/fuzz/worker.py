"""Owns the process that tries cases, each in a child of its own with a limit of time and of memory: what ends the child is a
finding and not the end.

Reads cases as lines of JSON, answers each with a line. Started by `Worker`, with one thread, so that a fork is safe.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SECONDS = 20
"""Of processor time that a case may take; a valid directory takes half a second."""

WAITED_SECONDS = 180.0
"""That a case may take by the clock, in which other processes may have had the cores."""

EXTRA_BYTES = 2**30
"""That a case may map beside what the process has mapped when it begins; a valid directory of 1 MB takes 0.1 GB."""

EXTRA_FILE_BYTES = 2**26
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "RAYON_NUM_THREADS"), "1")
QUIET = {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


class Worker:
    """The process, as its parent sees it. folder: where valid directories are made unless they are there, and cases broken."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        command = [sys.executable, "-m", "fuzz.worker", str(folder)]
        environment = os.environ | ONE_THREAD | QUIET | {"PYTHONPATH": os.pathsep.join(sys.path)}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True)
        self._answer()

    def tried(self, case: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The answers of every entry point (targets.Answer as tables); one finding where the child was ended."""
        self._process.stdin.write(json.dumps(case) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> Any:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker ended with {self._process.wait()}")
        return json.loads(line)


def serve(folder: Path) -> None:
    from fuzz import targets, valid

    answers_to = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    if not (folder / "valid").is_dir():
        valid.make(folder / "valid")
    surroundings = targets.Surroundings(folder / "valid")
    contents = {kind: valid.content(folder / "valid" / kind) for kind in valid.KINDS}
    (folder / "secret.txt").write_text("a file of the user that is no part of any model\n")
    answers_to.write("true\n")
    answers_to.flush()
    for number, line in enumerate(sys.stdin):
        place = folder / f"case-{os.getpid()}-{number}"
        place.mkdir()
        try:
            found = _tried(json.loads(line), contents, place, surroundings)
        finally:
            shutil.rmtree(place, ignore_errors=True)
        answers_to.write(json.dumps(found) + "\n")
        answers_to.flush()


def _tried(case: Mapping[str, Any], contents: Mapping[str, Any], place: Path, surroundings: Any) -> list[dict[str, Any]]:
    from fuzz.breaking import broken

    broken(contents[case["kind"]], case["breaks"], case.get("sealed", False)).write(place / "broken")
    canary = place / "canary"
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.environ["QTIP_FUZZ_CANARY"] = str(canary)
        _in_child(case, place, surroundings, writing)
    os.close(writing)
    text, ended = _collected(reading, child, 1.0 if case.get("trap") == "hang" else WAITED_SECONDS)
    found = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
    if ended:
        last = found[-1]["entry"] if found else "start"
        found.append({"entry": last, "kind": "finding", "what": ended, "where": f"{ended} after {last} of {case['kind']}"})
    if canary.exists():
        found.append({"entry": "load", "kind": "finding", "what": "code of the model ran", "where": "code of the model ran"})
    return found


def _in_child(case: Mapping[str, Any], place: Path, surroundings: Any, writing: int) -> None:
    from fuzz import targets

    status = 1
    try:
        os.chdir(place)
        os.dup2(os.open(place / "stderr", os.O_WRONLY | os.O_CREAT, 0o600), 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        resource.setrlimit(resource.RLIMIT_AS, (_mapped_bytes() + EXTRA_BYTES,) * 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (EXTRA_FILE_BYTES,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
        if "trap" in case:
            targets.TRAPS[case["trap"]]()
        for answer in targets.answers(case["kind"], place / "broken", surroundings, case.get("depth", 0)):
            os.write(writing, (json.dumps(targets.as_json(answer)) + "\n").encode())
        status = 0
    except MemoryError:
        os.write(writing, b'{"entry": "start", "kind": "finding", "what": "MemoryError", "where": "MemoryError"}\n')
        status = 0
    finally:
        os._exit(status)


def _collected(reading: int, child: int, seconds: float) -> tuple[str, str]:
    """(what the child wrote, how it was ended where it did not end well)."""
    until = time.monotonic() + seconds
    parts, is_hung = [], False
    while True:
        ready, _, _ = select.select([reading], [], [], max(0.0, until - time.monotonic()))
        if not ready:
            is_hung = True
            os.kill(child, signal.SIGKILL)
            break
        part = os.read(reading, 2**16)
        if not part:
            break
        parts.append(part)
    os.close(reading)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if is_hung:
        return b"".join(parts).decode(), f"no answer in {seconds:.0f} s"
    return b"".join(parts).decode(), "" if status == 0 else f"the process ended with {status}"


def _mapped_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        serve(Path(sys.argv[1]))
