"""Runs clients of a loopback Hub, each in a process that finds it where huggingface_hub looks for the real one.

As a script it imports the command line and transformers once, with the environment it was started in, and then forks a process
for each line of its input: {"arguments": of a qtip command, or "program": Python, "variables", "folder", "output": a file for
both streams}. It prints the process's id, and its exit status when it ends.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]


class Ended(NamedTuple):
    """What a client left."""

    status: int
    output: str


class Clients:
    """A process that forks clients, one at a time."""

    def __init__(self, environment: dict[str, str], folder: Path) -> None:
        self.folder = folder
        path = os.pathsep.join(str(ROOT / part) for part in ("src", "kernels", "tests"))
        variables = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
        inherited = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=inherited | variables | environment,
            text=True,
        )
        self._output = folder / "client-output"
        self.id = 0

    def qtip(self, *arguments: object, token: str | None = "hf_writer_token", **variables: str) -> Ended:
        """Run one qtip command to its end."""
        self.start(*arguments, token=token, **variables)
        return self.wait()

    def python(self, program: str, token: str | None = "hf_writer_token") -> Ended:
        """Run one program to its end."""
        self._send({"program": program}, token, {})
        return self.wait()

    def start(self, *arguments: object, token: str | None = "hf_writer_token", **variables: str) -> None:
        """Start one qtip command."""
        self._send({"arguments": [str(argument) for argument in arguments]}, token, variables)

    def kill(self) -> Ended:
        """SIGKILL to the client that runs."""
        os.kill(self.id, signal.SIGKILL)
        return self.wait()

    def wait(self) -> Ended:
        """Wait for the client that runs."""
        return Ended(int(self._process.stdout.readline()), self._output.read_text())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def _send(self, what: dict[str, Any], token: str | None, variables: dict[str, str]) -> None:
        given = variables | ({} if token is None else {"HF_TOKEN": token})
        order = what | {"variables": given, "folder": str(self.folder), "output": str(self._output)}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        self.id = int(self._process.stdout.readline())


def _become(order: dict[str, Any]) -> int:
    os.environ.update(order["variables"])
    os.chdir(order["folder"])
    file = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if "program" in order:
        exec(compile(order["program"], "<program>", "exec"), {"__name__": "__main__"})
        return 0
    from qtipcli.cli.main import _run
    from qtipcli.hub import repository
    from qtipcli.stages import push

    # A test's model is small and its Hub near: what is large there, and long, is scaled.
    push.LARGE_BYTES = 1_000
    repository.WAITS = (0.01,) * len(repository.WAITS)
    return _run(order["arguments"])


def _main() -> None:
    from qtipcli.cli.main import _prepare_environment

    _prepare_environment()
    import transformers  # noqa: F401
    from transformers import AutoModelForCausalLM  # noqa: F401

    import qtipcli.stages.measure
    import qtipcli.stages.push  # noqa: F401

    for line in sys.stdin:
        order = json.loads(line)
        process = os.fork()
        if not process:
            status = 70
            try:
                status = _become(order)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)  # not sys.exit: the rest of this file is the parent's
        print(process, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


if __name__ == "__main__":
    _main()
