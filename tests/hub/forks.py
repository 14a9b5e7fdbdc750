"""Runs Python programs, each in a process that has imported torch and nothing else of what is tested.

As a script it reads {name: program} as JSON from its input, forks once for each, and prints {name: [exit status, output]}.
One import of torch serves all of them, which is most of what a fresh process costs.
"""

import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[2]
TIMEOUT = 240
"""Seconds for all programs together: on a busy machine one import of transformers takes up to half a minute."""


def environment() -> dict[str, str]:
    """This process's, with the packages and tests of the checkout importable and no way to the hub."""
    path = [str(ROOT / folder) for folder in ("src", "kernels", "tests")] + [os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "warning"}


def run(programs: dict[str, str]) -> dict[str, tuple[int, str]]:
    """Name -> (exit status, what it printed on either stream)."""
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(programs),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=True,
    )
    return {name: tuple(result) for name, result in json.loads(done.stdout).items()}


def _fork(program: str, output: str) -> int:
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        file = os.open(output, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, 1)
        os.dup2(file, 2)
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Not sys.exit: the rest of this file is the parent's.
        os._exit(status)


def _main() -> None:
    import torch  # noqa: F401

    programs = json.load(sys.stdin)
    with tempfile.TemporaryDirectory() as folder:
        started = {name: _fork(program, f"{folder}/{number}") for number, (name, program) in enumerate(programs.items())}
        results = {}
        for number, (name, process) in enumerate(started.items()):
            status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            results[name] = (status, Path(f"{folder}/{number}").read_text())
    print(json.dumps(results))


if __name__ == "__main__":
    _main()
