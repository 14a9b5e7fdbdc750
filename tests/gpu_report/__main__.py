"""Owns the command: PYTHONPATH=src:kernels:tests python -m gpu_report [--out DIRECTORY] [--only SECTION ...].

Exit status 0 all ran and passed, 1 something failed or did not fit into the time, 2 there is no GPU to measure on.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

from gpu_report.figures import crossover_batches, figures, markdown
from gpu_report.supervisor import supervise, work
from gpu_report.units import REAL, ROOT, TINY, all_units

BUDGET_SECONDS = 450
"""For everything, so that it ends in under 8 minutes with what starting and ending take."""


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(prog="gpu_report", description="Test and measure the kernels on this machine's GPU.")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks", help="where the JSON goes")
    parser.add_argument("--budget", type=float, default=BUDGET_SECONDS, help="seconds for everything")
    parser.add_argument("--only", nargs="+", metavar="SECTION", help="these sections of the report and no other")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # the script's own test, on a CPU
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    for name, value in (("HF_HUB_OFFLINE", "1"), ("TOKENIZERS_PARALLELISM", "false"), ("TQDM_DISABLE", "1")):
        os.environ.setdefault(name, value)
    sizes = TINY if asked.tiny else REAL
    if asked.worker is not None:
        return _work(sizes, asked)
    reason = None if asked.tiny else why_not()
    if reason:
        print(f"make test-gpu: nothing was measured: {reason}", file=sys.stderr)
        return 2
    # So that a worker is ended with us, by `timeout` for instance.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    return _report(sizes, asked)


def why_not() -> str | None:
    """Why nothing can be measured here, as a clause; None where it can."""
    try:
        import torch
    except ImportError:
        return f"{sys.executable} has no torch (give another Python: make test-gpu PYTHON=...)"
    if not torch.cuda.is_available():
        return "torch sees no GPU on this machine"
    from qtipcli_kernels import device

    return device.why_not("cuda")


def _work(sizes: Any, asked: argparse.Namespace) -> int:
    """In the worker: standard output is the report's, so whatever a library prints there goes to standard error."""
    if sizes is TINY:
        from qtipcli.stages import bench, limits

        bench._peak_extra_megabytes = lambda spec: 0.0  # a CPU's, in a process of its own
        limits.COPY_BYTES = dict.fromkeys(limits.COPY_BYTES, 1 << 20)
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)
        return work(all_units(sizes, asked.only), asked.worker, out)


def _report(sizes: Any, asked: argparse.Namespace) -> int:
    started = time.monotonic()
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    file = asked.out / f"gpu-{slug(_device_name(asked.tiny))}-{date}.json"
    asked.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "device": _device_name(asked.tiny),
        "date": date,
        "complete": False,
        "sections": {},
        "not_run": [],
    }

    def write() -> None:
        report["seconds"] = round(time.monotonic() - started, 1)
        report["figures"] = figures(report["sections"])
        report["crossover_batches"] = crossover_batches(report["sections"])
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        partial.replace(file)

    command = [sys.executable, "-m", "gpu_report", *(["--tiny"] if asked.tiny else [])]
    command += ["--only", *asked.only] if asked.only else []
    command.append("--worker")
    supervise(all_units(sizes, asked.only), command, report, write, asked.budget)
    report["complete"] = not report["not_run"]
    write()
    failed = [f"{name}: {each['unit']}" for name, section in report["sections"].items() for each in section["failed"]]
    print(markdown(report["figures"]))
    not_run = ", ".join(report["not_run"]) or "nothing"
    print(f"{file}: {report['seconds']:.0f} s; failed: {', '.join(failed) or 'nothing'}; not run: {not_run}")
    return 1 if failed or report["not_run"] else 0


def _device_name(tiny: bool) -> str:
    if tiny:
        return "tiny run on a CPU"
    import torch

    return torch.cuda.get_device_name(0)


def slug(name: str) -> str:
    """A device's name as a part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


if __name__ == "__main__":
    sys.exit(main())
