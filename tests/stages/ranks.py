"""Runs qtip as several processes that share a job, as torchrun does, but in forks of one process that has imported everything.

    PYTHONPATH=src:kernels:tests python -m stages.ranks FOLDER

Makes a tiny packed model in FOLDER (`model`, `text.txt`, `out`), says so in a line, and then answers each line of JSON on
stdin by one on stdout. A request: {"world": processes, "arguments": of qtip, "where": directory to work in, "patches":
{"module.NAME": value}, "signal": [rank, number, pattern], "apart": true}; the signal is sent when a file below `where` matches
the pattern; ranks that are apart work each in a directory of its own, `where`/RANK.
The answer: {"statuses": exit status of each rank, negative for a signal; "err", "out": what each wrote; "last_s": seconds from
the signal to the end of the last rank, null without one; "wall_s": seconds of all; "cpu_s": of each rank}.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from stages.kills import warm_up
from stages.tiny import environment

LONGEST_S = 120.0
"""After this a rank that has not ended is killed: the test then fails instead of waiting."""


class Ended(NamedTuple):
    """What the ranks of a command left; see above."""

    statuses: list[int]
    err: list[str]
    out: list[str]
    last_s: float | None
    wall_s: float
    cpu_s: list[float]

    def said(self, text: str) -> int:
        """How often the ranks together wrote this on stderr."""
        return sum(err.count(text) for err in self.err)


class Ranks:
    """The process that forks them; a context manager. folder: where its model is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        command = [sys.executable, "-m", "stages.ranks", str(folder)]
        pipe = subprocess.PIPE
        self._server = subprocess.Popen(command, env=environment(), stdin=pipe, stdout=pipe, text=True)
        assert self._server.stdout is not None
        assert self._server.stdout.readline() == "ready\n"

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *failure: object) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(timeout=60)

    def __call__(self, world: int, where: Path, *arguments: object, **request: Any) -> Ended:
        asked = {"world": world, "where": str(where), "arguments": [str(argument) for argument in arguments], **request}
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(asked) + "\n")
        self._server.stdin.flush()
        return Ended(**json.loads(self._server.stdout.readline()))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launched(rank: int, world: int, port: int) -> dict[str, str]:
    """The environment that torchrun gives a process; the store that they meet at is not in one of them."""
    numbers = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    return {name: str(number) for name, number in numbers.items()} | {
        "MASTER_ADDR": "127.0.0.1",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def _fork_store(port: int, world: int) -> int:
    """What torchrun itself does: hold the store that the ranks meet at, until it is killed."""
    pid = os.fork()
    if pid:
        return pid
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", port, world, is_master=True, wait_for_workers=False)
    signal.pause()
    os._exit(int(store is None))


def _fork(rank: int, port: int, request: dict[str, Any], where: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        own = where / str(rank) if request.get("apart") else where
        own.mkdir(exist_ok=True)
        os.chdir(own)
        for descriptor, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{where}.{name}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        if request["world"] > 1:
            os.environ.update(launched(rank, request["world"], port))
        for path, value in request.get("patches", {}).items():
            module, _, name = path.rpartition(".")
            setattr(importlib.import_module(module), name, value)
        from qtipcli.cli.main import _run

        status = _run(request["arguments"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _serve(request: dict[str, Any]) -> Ended:
    where, ranks, port = Path(request["where"]), range(request["world"]), free_port()
    where.mkdir(parents=True, exist_ok=True)
    store = _fork_store(port, request["world"])
    started = time.monotonic()
    pids = [_fork(rank, port, request, where) for rank in ranks]
    signalled = None
    if request.get("signal"):
        rank, number, pattern = request["signal"]
        deadline = time.monotonic() + LONGEST_S
        while not any(where.glob(pattern)) and time.monotonic() < deadline:
            time.sleep(0.002)
        os.kill(pids[rank], number)
        signalled = time.monotonic()
    # An alarm, because a rank that hangs would never be waited for to the end.
    signal.signal(signal.SIGALRM, lambda *_: [os.kill(pid, signal.SIGKILL) for pid in pids])
    signal.alarm(int(request.get("longest_s", LONGEST_S)))
    ends = [os.wait4(pid, 0) for pid in pids]
    statuses = [os.waitstatus_to_exitcode(status) for _, status, _ in ends]
    signal.alarm(0)
    os.kill(store, signal.SIGKILL)
    os.waitpid(store, 0)
    ended = time.monotonic()
    last_s = None if signalled is None else ended - signalled
    cpu_s = [usage.ru_utime + usage.ru_stime for _, _, usage in ends]
    err, out = ([Path(f"{where}.{name}-{rank}").read_text() for rank in ranks] for name in ("err", "out"))
    return Ended(statuses, err, out, last_s, ended - started, cpu_s)


def _main() -> None:
    folder = Path(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    warm_up(folder, "finetune")
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(_serve(json.loads(line))._asdict()), file=answers, flush=True)


if __name__ == "__main__":
    _main()
