"""Owns the compilation of kernels for tests: in a process of its own, since this one's Triton may be the interpreter."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ptx


@dataclass(frozen=True)
class Kernel:
    """A kernel compiled for an NVIDIA target, ready for the emulator."""

    ptx: str
    num_warps: int
    shared_bytes: int

    def launch(self, grid: Sequence[int], *arguments: object, profile: bool = False) -> ptx.Report:
        """Run it on NumPy arrays or CPU tensors, which it changes in place (see ptx.launch)."""
        return ptx.launch(self.ptx, grid, self.num_warps, arguments, self.shared_bytes, profile)


def table(*options: str) -> tuple[int, dict[str, Any], str]:
    """`python -m qtipcli_kernels.compiling` with these options: exit status, its table, what it printed."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "table.json"
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), *sys.path]))
        command = [sys.executable, "-m", "qtipcli_kernels.compiling", "--json", str(file), *options]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return done.returncode, json.loads(file.read_text()) if file.exists() else {"rows": []}, done.stdout


@lru_cache(maxsize=16)
def kernels(module: str, targets: tuple[str, ...], only: str = "") -> dict[tuple[str, str], Kernel]:
    """(case, target) -> kernel, for a module's compile cases (or the whole package's) whose names contain `only`."""
    with TemporaryDirectory() as folder:
        status, result, printed = table(
            "--module", module, "--targets", *targets, "--only", only, "--asm", folder, "--no-counts"
        )
        assert status == 0, printed
        return {
            (row["case"], row["target"]): Kernel(Path(row["asm"]).read_text(), row["num_warps"], row["shared_bytes"])
            for row in result["rows"]
        }
