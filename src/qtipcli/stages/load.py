"""Owns how stages bring a whole model into memory to run it: packed or plain, local or from the Hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

import qtipcli  # noqa: F401, registers the format with transformers
from qtipcli.errors import QtipError, first_line
from qtipcli.job import launcher
from qtipcli.model import dequantized
from qtipcli.model.skeleton import Skeleton
from qtipcli.model.source import ModelSource
from qtipcli.untrusted import read_table, refuse_impossible


def default_device() -> torch.device:
    """A GPU where there is one; where several processes share a machine, each its own, cuda:LOCAL_RANK."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", launcher.local_rank()) if launcher.world() > 1 else torch.device("cuda")


HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
"""The hub refuses names that begin with a dot or dash, so "./model" is a path."""


def check_name(name_or_path: str | Path) -> None:
    """Raise QtipError where this is neither a directory nor could be a hub name, before anything asks the hub for it."""
    if not Path(name_or_path).is_dir() and not HUB_NAME.fullmatch(str(name_or_path)):
        raise QtipError(f"{name_or_path} does not exist", "give a model's directory, or a hub name such as org/model")


def load_model(name_or_path: str | Path, dtype: torch.dtype | None = None, trust_remote_code: bool = False) -> Any:
    """The model in eval mode, on the default device.

    dtype: None is float32 on a CPU, which has no fast 16-bit arithmetic everywhere, and the model's own on a GPU.
    Raises QtipError with what transformers says where it cannot be loaded.
    """
    device = default_device()
    if dequantized.is_one(vars(load_config(name_or_path, trust_remote_code))):
        return _load_dequantized(name_or_path, dtype, trust_remote_code)
    chosen = dtype or ("auto" if device.type == "cuda" else torch.float32)
    model = _loaded(AutoModelForCausalLM, name_or_path, dtype=chosen, trust_remote_code=trust_remote_code)
    return model.to(device).eval()


def _load_dequantized(name_or_path: str | Path, dtype: torch.dtype | None, trust_remote_code: bool) -> Any:
    """A model that is stored in FP8 or MXFP4, whose own kernels run on few GPUs: as calibration and rounding see it."""
    source = ModelSource.open(name_or_path, trust_remote_code=trust_remote_code)
    skeleton = Skeleton(source, computing_dtype(source.config, dtype), default_device())
    for index in range(len(skeleton.blocks)):
        skeleton.materialize(index)
    skeleton.materialize_outer(head=True)
    skeleton.model.config.use_cache = True
    return skeleton.model


def computing_dtype(config: PreTrainedConfig, dtype: torch.dtype | None) -> torch.dtype:
    """What load_model computes in where it is given this dtype."""
    stated = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return dtype or (torch.float32 if default_device().type == "cpu" else stated or torch.float32)


def load_config(name_or_path: str | Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The model's config alone; raises as load_model does."""
    return _loaded(AutoConfig, name_or_path, trust_remote_code=trust_remote_code)


def load_tokenizer(name_or_path: str | Path, trust_remote_code: bool = False) -> Any:
    """The model's tokenizer; raises as load_model does."""
    return _loaded(AutoTokenizer, name_or_path, trust_remote_code=trust_remote_code)


def _loaded(kind: Any, name_or_path: str | Path, **how: Any) -> Any:
    check_name(name_or_path)
    if (config := Path(name_or_path) / "config.json").is_file():
        refuse_impossible(read_table(config, "download or export the model again"), str(name_or_path))
    try:
        return kind.from_pretrained(name_or_path, **how)
    except QtipError:
        raise
    # A directory that somebody else wrote can make transformers raise anything.
    except Exception as error:
        hint = "check the name, and that transformers loads it"
        raise QtipError(f"{name_or_path} cannot be loaded: {first_line(error)}", hint) from error
