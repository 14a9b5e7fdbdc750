"""Owns the command: PYTHONPATH=src:kernels:tests python -m versions [VERSION ...]. Exit status 0 where every version passed.

For each version of transformers: an environment, the tests of hub/ and nn/ in it, and a packed model with its logits. Then each
version loads the models that every version wrote, and must give the writer's logits, bit for bit.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from versions.environments import ROOT, VERSIONS, environment, found, run

TESTS = ("tests/hub", "tests/nn")


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and test."""
    parser = argparse.ArgumentParser(prog="versions", description="Test the plugin on several versions of transformers.")
    parser.add_argument("versions", nargs="*", default=VERSIONS, help=f"of transformers [{' '.join(VERSIONS)}]")
    parser.add_argument("--folder", type=Path, default=ROOT / ".venvs", help="where the environments go")
    parser.add_argument("--exchange-only", action="store_true", help="leave out the tests of hub/ and nn/")
    asked = parser.parse_args(arguments)
    failed = []
    with tempfile.TemporaryDirectory() as written:
        pythons = {version: environment(version, asked.folder) for version in asked.versions}
        for version, python in pythons.items():
            print(f"=== {version}: " + ", ".join(f"{name} {number}" for name, number in found(python).items()))
            started = time.monotonic()
            if not asked.exchange_only and run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS):
                failed.append(f"{version}: tests")
            if run(python, "-m", "versions.exchange", "write", f"{written}/{version}"):
                failed.append(f"{version}: writing")
            print(f"=== {version}: {time.monotonic() - started:.0f} s")
        for version, python in pythons.items():
            if run(python, "-m", "versions.exchange", "read", *(f"{written}/{each}" for each in pythons)):
                failed.append(f"{version}: reading")
    print("failed: " + "; ".join(failed) if failed else f"passed on {', '.join(pythons)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
