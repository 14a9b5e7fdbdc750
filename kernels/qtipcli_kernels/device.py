"""Owns what the Triton kernels need to know of the machine: whether they run on a device, and if not, why."""

import os
from functools import lru_cache

import torch

MIN_TRITON = (3, 2)
"""Oldest Triton whose compiler takes these kernels: the one that torch 2.6 brings."""

MIN_CAPABILITY = (8, 0)
"""Oldest NVIDIA compute capability: `mma.m16n8k16` with fp16 and asynchronous copies."""

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton reads this when a kernel is defined: its interpreter then runs them on CPU tensors, for tests."""


class DeviceError(RuntimeError):
    """A kernel was asked to run where it cannot; the message names the device and the remedy."""


def why_not(device: torch.device | str) -> str | None:
    """Why the Triton kernels do not run on `device`, as a clause for a report; None where they do."""
    device = torch.device(device)
    if device.type == "cpu":
        return _without_triton() if INTERPRETED else "Triton compiles for GPUs only"
    if device.type != "cuda":  # torch calls AMD's devices "cuda" too
        return f"the kernels are written for NVIDIA and AMD GPUs, not for device type {device.type}"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    index = torch.cuda.current_device() if device.index is None else device.index
    return _without_triton() or _unfit_gpu(index)


def check(**tensors: torch.Tensor | None) -> None:
    """Raise DeviceError unless every tensor lies on one device that the Triton kernels run on.

    tensors: by the names that the message shall use; None stands for one that is not given.
    """
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        places = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise DeviceError(f"the tensors of one product lie on different devices: {places}; move them to one")
    device = next(iter(devices.values()))
    reason = why_not(device)
    if reason is not None:
        raise DeviceError(f"no Triton kernel for {device}: {reason}; call qtipcli_kernels.dispatch, which knows what serves it")


@lru_cache(maxsize=1)
def _without_triton() -> str | None:
    try:
        import triton
    except ImportError:
        return "Triton is not installed (pip install triton)"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < MIN_TRITON:
        return f"Triton {triton.__version__} is too old: {MIN_TRITON[0]}.{MIN_TRITON[1]} or newer is needed"
    return None


@lru_cache(maxsize=16)
def _unfit_gpu(index: int) -> str | None:
    if torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(index)
    if capability < MIN_CAPABILITY:
        name = torch.cuda.get_device_name(index)
        return f"{name} has compute capability {capability[0]}.{capability[1]}: the kernels need 8.0 (Ampere) or newer"
    return None
