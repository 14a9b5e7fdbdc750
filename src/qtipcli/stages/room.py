"""Owns the question of how much memory is left, on a GPU or on a CPU."""

from __future__ import annotations

import re
from pathlib import Path

import torch


def free_bytes(device: torch.device) -> int:
    """Memory that a process may still take there: on a CPU within what the machine and the control group have left."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    status = Path("/proc/meminfo").read_text(encoding="ascii")
    free = int(re.search(r"MemAvailable:\s+(\d+) kB", status)[1]) * 1024
    return min([free, *group_free()])


def group_free(root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Free bytes within the control group's limit, where it has one (the kernel's cgroup-v2 document: memory.max)."""
    try:
        limit = (root / "memory.max").read_text(encoding="ascii").strip()
        used = int((root / "memory.current").read_text(encoding="ascii"))
        counted = dict(line.split() for line in (root / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return []
    # Pages of files that were read count as used, and go when memory is wanted.
    return [] if limit == "max" else [int(limit) - used + int(counted.get("inactive_file", 0))]
