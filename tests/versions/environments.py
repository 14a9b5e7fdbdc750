"""Owns the environments of `make test-versions`: which versions of transformers, and how each gets a Python of its own.

An environment lies over the one that runs this: it holds transformers and what of its dependencies must differ, and finds all
else (torch above all) where this one has it. 100 MB instead of 2 GB each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]

VERSIONS = ("5.10.4", "5.17.0", "5.24.0")
"""The oldest that pyproject.toml allows, one in the middle, the newest on PyPI on 2026-11-26: the one place to change them."""

DEPENDENCIES = ("huggingface_hub", "tokenizers", "safetensors")
"""What versions of transformers disagree about; each gets the newest that it allows."""

QUIET = dict.fromkeys(("HF_HUB_OFFLINE", "TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS"), "1") | {
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_WAIT_POLICY": "PASSIVE",
}


def environment(version: str, folder: Path) -> Path:
    """The Python of the environment for this version of transformers below `folder`, made if need be."""
    home = folder / version
    python = home / "bin" / "python"
    ready = home / "ready"
    if ready.exists():
        return python
    venv.create(home, with_pip=True, clear=True)
    where = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True, check=True
    )
    # Lines of a .pth file come after the environment's own packages on the path, so that those win.
    Path(where.stdout.strip(), "below.pth").write_text(sysconfig.get_path("purelib") + "\n")
    wanted = [f"transformers=={version}", *DEPENDENCIES]
    # Upgraded, for pip would be content with what lies below if it fits; what does not is laid over it.
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--upgrade", *wanted], check=True)
    ready.touch()
    return python


def found(python: Path) -> dict[str, str]:
    """Package -> version that this Python imports, of transformers, its dependencies and torch."""
    names = ["transformers", *DEPENDENCIES, "torch"]
    program = f"import importlib, json; print(json.dumps({{n: importlib.import_module(n).__version__ for n in {names!r}}}))"
    done = subprocess.run([python, "-c", program], capture_output=True, text=True, check=True, env=variables())
    return json.loads(done.stdout.splitlines()[-1])


def variables() -> dict[str, str]:
    """The variables that tests run under: the checkout importable, no hub."""
    path = os.pathsep.join(str(ROOT / part) for part in ("src", "kernels", "tests"))
    return os.environ | {"PYTHONPATH": path} | QUIET


def run(python: Path, *arguments: object) -> int:
    """Exit status of this Python with these arguments, in the checkout, its output on ours."""
    sys.stdout.flush()
    return subprocess.run([python, *map(str, arguments)], cwd=ROOT, env=variables()).returncode
