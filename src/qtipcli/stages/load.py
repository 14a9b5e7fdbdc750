"""Owns how stages bring a whole model into memory to run it: packed or plain, local or from the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import qtipcli  # noqa: F401, registers the format with transformers
from qtipcli.errors import QtipError


def default_device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_model(name_or_path: str | Path, dtype: torch.dtype | None = None, trust_remote_code: bool = False) -> Any:
    """The model in eval mode, on the default device.

    dtype: None is float32 on a CPU, which has no fast 16-bit arithmetic everywhere, and the model's own on a GPU.
    Raises QtipError with what transformers says where it cannot be loaded.
    """
    device = default_device()
    chosen = dtype or ("auto" if device.type == "cuda" else torch.float32)
    try:
        model = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=chosen, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        fact = str(error).strip().split("\n")[0].rstrip(".")
        raise QtipError(f"{name_or_path} cannot be loaded: {fact}", "check that it is a causal language model") from error
    return model.to(device).eval()
