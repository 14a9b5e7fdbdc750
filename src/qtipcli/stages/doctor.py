"""Owns `qtip doctor`: what this machine can run, found by asking it rather than by guessing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from typing import Any

import llvmlite.binding
import torch

import qtipcli
from qtipcli_kernels import dispatch
from qtipcli_kernels.device import why_not
from qtipcli_kernels.spec import TrellisSpec
from qtipcli_kernels.threads import thread_count

PACKAGES = ("torch", "transformers", "huggingface_hub", "safetensors", "accelerate", "datasets", "numba", "triton")

MIN_TRANSFORMERS = (5, 10, 4)


def run() -> dict[str, Any]:
    """{"device", "rows": [{"what", "value", "fine"}]}; fine is False where qtip would not work."""
    rows = [
        _row("qtip", qtipcli.__version__),
        _row("Python", platform.python_version(), sys.version_info >= (3, 11)),
        _row("system", f"{platform.system()} {platform.machine()}"),
        _row("CPU", f"{cpu_name()}, {len(os.sched_getaffinity(0))} cores, {thread_count()} kernel threads"),
        _row("memory", f"{_memory_gib():.1f} GiB"),
    ]
    rows += [_package(name) for name in PACKAGES]
    rows.append(_row("CPU kernels", *_try_encode()))
    rows.append(_gpu())
    return {"device": cpu_name(), "rows": rows}


def cpu_name() -> str:
    """The processor with its widest vectors, as LLVM compiles for it."""
    features = llvmlite.binding.get_host_cpu_features()
    widest = next((name for name in ("avx512f", "avx2", "neon") if features.get(name)), "no wide vectors")
    return f"{llvmlite.binding.get_host_cpu_name()} ({widest})"


def _row(what: str, value: str, fine: bool = True) -> dict[str, Any]:
    return {"what": what, "value": value, "fine": fine}


def _package(name: str) -> dict[str, Any]:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return _row(name, "not installed" + (" (needed for GPU kernels only)" if name == "triton" else ""), name == "triton")
    if name == "transformers" and tuple(int(part) for part in version.split(".")[:3] if part.isdigit()) < MIN_TRANSFORMERS:
        return _row(name, f"{version}: 5.10.4 or newer is needed", False)
    return _row(name, version)


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _try_encode() -> tuple[str, bool]:
    """Compile and run the smallest job there is: that, not an import, is what can fail."""
    spec = TrellisSpec("3inst", 2, 8)
    tile = torch.zeros(1, 256)
    try:
        dispatch.encode(tile, spec)
    except Exception as error:
        return f"failed: {error}", False
    return "encode, decode, product and transform compile and run", True


def _gpu() -> dict[str, Any]:
    if not torch.cuda.is_available():
        return _row("GPU", "none seen by torch: everything runs on the CPU")
    name = torch.cuda.get_device_name()
    reason = why_not("cuda")
    if reason is not None:
        return _row("GPU", f"{name}: models run there through the torch reference, right but slow: {reason}", False)
    return _row("GPU", *_try_product(name))


def _try_product(name: str) -> tuple[str, bool]:
    """Compile and run a product on the GPU."""
    spec = TrellisSpec("3inst", 2)
    try:
        trellis = torch.zeros(1, spec.words_per_tile, dtype=torch.int32, device="cuda")
        dispatch.matvec(torch.ones(1, 16, dtype=torch.float16, device="cuda"), trellis, spec)
    except Exception as error:
        return f"{name}: its kernels failed: {error}", False
    return f"{name}: Triton kernels compile and run", True
