"""Owns what this process has taken so far: memory that is resident, and time since it was started (Linux's /proc)."""

from __future__ import annotations

import gc
import os
import re
import resource
from collections.abc import Callable
from pathlib import Path

from qtipcli.model.skeleton import give_back_freed_memory


def resident_bytes() -> int:
    """Memory of this process that is in RAM now."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024


def settled_bytes() -> int:
    """Memory of this process behind a measurement, once what was freed is given back, as stages do after each block."""
    gc.collect()
    give_back_freed_memory()
    return resident_bytes()


def peak_bytes() -> int:
    """Most memory that this process has had in RAM so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def growth_bytes(call: Callable[[], object]) -> int:
    """Most memory that `call` adds to what is resident, holes in the heap included; 0 where Linux does not reset its mark."""
    before = settled_bytes()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM starts again (proc_pid_clear_refs(5))
    except OSError:
        return 0
    call()
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return max(0, int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024 - before)


def age_seconds() -> float:
    """Since this process was started: what the interpreter and the imports took, if nothing else was done yet."""
    # The name in parentheses may hold spaces; the start is the 22nd field, the 20th behind it (proc_pid_stat(5)).
    stat = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    uptime = float(Path("/proc/uptime").read_text(encoding="ascii").split()[0])
    return uptime - int(stat[19]) / os.sysconf("SC_CLK_TCK")
