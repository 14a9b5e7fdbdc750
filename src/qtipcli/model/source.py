"""Owns a model's directory: where it is, what its config says, which tensors lie in which shard, and reading one of them.

Only this file opens a model's safetensors or asks the Hub for a model, so every way in which a directory can be unusable is
refused here, before any work is done. Nothing is unpickled, and no code of the model runs unless the caller trusts it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig

from qtipcli.errors import CorruptError, QtipError, SettingsError, first_line, storage_error
from qtipcli.model import dequantized
from qtipcli.model.hub_errors import at, hub_errors, near_folder
from qtipcli.untrusted import is_inside, read_table, refuse_impossible

AGAIN = "download or export the model again"
CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")

# Everything of a repository that is neither weights nor a copy of the model for another program (onnx/, original/, gguf).
_SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.md", "LICENSE*", "NOTICE*")
_CODE_FILES = ("*.py",)
OTHER_COPIES = ("onnx/*", "openvino/*", "original/*", "coreml/*")

# The dtypes that are read, by safetensors' names for them (safetensors format description). Others are left out on purpose:
# such a checkpoint is quantized already.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    **dequantized.DTYPES,
}

# How classes that predict the next token are called in a config's "architectures"; "...Model" is one saved without its head.
_GENERATING_CLASSES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_HEADLESS_CLASS = "Model"


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor of the checkpoint lies and what it is, from its shard's header."""

    shard: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


class ModelSource:
    """A model directory, opened and checked, from which tensors are read one at a time. Make one with `open`.

    Attributes:
        directory: where the files are (a Hub model: its snapshot in the cache).
        name: the model as the user typed it.
        slug: the name as a part of a file name.
        config: the transformers config.
        trust_remote_code: whether code in the directory may run.
        tensor_names: every tensor of the checkpoint, shard by shard; of one that is stored in FP8 or MXFP4, what it stands for.
        shards: the safetensors files that hold them, sorted by name.
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        config: PreTrainedConfig,
        fields: dict[str, Any],
        tensors: dict[str, StoredTensor],
        trust_remote_code: bool,
    ) -> None:
        self.directory = directory
        self.name = name
        self.config = config
        self.trust_remote_code = trust_remote_code
        self._stored = tensors
        self._tensors: dict[str, StoredTensor | dequantized.Scaled] = dequantized.logical(tensors, fields, name)

    @classmethod
    def open(
        cls,
        name_or_path: str | Path,
        revision: str | None = None,
        trust_remote_code: bool = False,
        accepted_method: str | None = None,
    ) -> ModelSource:
        """Finds the model, downloads it if it is on the Hub, and checks everything that can be checked without reading weights.

        Args:
            name_or_path: a local directory, or a Hub id such as "org/model".
            revision: branch, tag or commit of a Hub model.
            trust_remote_code: let transformers run Python files that come with the model.
            accepted_method: a model that was quantized by this method is opened too; `config` then says nothing about it.

        Raises:
            QtipError: the model does not exist or cannot be fetched, holds no safetensors weights, is quantized already, or
                is not a causal language model.
            CorruptError: a config, index or shard is damaged or missing; the file is named.
        """
        name = str(name_or_path)
        directory = _locate(name, revision, trust_remote_code, accepted_method)
        return cls.of_directory(directory, name, trust_remote_code, accepted_method)

    @classmethod
    def of_directory(
        cls,
        directory: Path,
        name: str,
        trust_remote_code: bool,
        accepted_method: str | None = None,
        tensors: dict[str, StoredTensor] | None = None,
    ) -> ModelSource:
        """As `open`, of a directory that is there. tensors: what its weights are, where only the rest of it is there."""
        fields = read_table(directory / CONFIG_FILE, AGAIN)
        _refuse_quantized(fields, name, accepted_method)
        refuse_impossible(fields, name)
        config = _load_config(directory, name, trust_remote_code)
        for part in (config, config.get_text_config()):
            if hasattr(part, "quantization_config"):
                del part.quantization_config  # of what is read from here on it is not true
        _refuse_other_tasks(config, name)
        if tensors is None:
            tensors = {}
            for shard, expected in _shard_contents(directory, name).items():
                tensors |= _read_header(shard, expected)
        return cls(directory, name, config, fields, tensors, trust_remote_code)

    @property
    def slug(self) -> str:
        is_local = Path(self.name).expanduser().is_dir()
        stem = self.directory.resolve().name if is_local else self.name.replace("/", "--")
        return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.") or "model"

    @property
    def tensor_names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    @property
    def shards(self) -> list[Path]:
        return sorted({tensor.shard for tensor in self._stored.values()})

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor of the checkpoint, without reading it."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor of the checkpoint, without reading it."""
        return self._tensors[name].dtype

    def read(self, name: str, row: int | None = None) -> Tensor:
        """Reads one tensor, on the CPU: as stored, or what it stands for. The file is mapped, so memory is taken as the values
        are used.

        row: index in its first dimension, of the one part to be read; None for all of it.

        Raises:
            CorruptError: the shard is not what it was when the model was opened.
        """
        tensor = self._tensors[name]
        return tensor.read(self._read, row) if isinstance(tensor, dequantized.Scaled) else self._read(name, row)

    def _read(self, name: str, row: int | None) -> Tensor:
        shard = self._stored[name].shard
        try:
            # Opened anew each time: pages of a mapping that stays open would add up to the whole model.
            with safe_open(shard, framework="pt") as file:
                return file.get_tensor(name) if row is None else file.get_slice(name)[row]
        except OSError as error:
            raise storage_error(error, shard, "read") from error
        except SafetensorError as error:
            raise _corrupt_shard(shard, error) from error


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuses weights that are NaN or infinite.

    Args:
        name: what to call the tensor in the error.
        tensor: any shape; integer tensors pass.

    Raises:
        CorruptError: with the name and the number of bad values.
    """
    if not tensor.is_floating_point():
        return
    finite = torch.isfinite(tensor)
    if not finite.all():
        bad = finite.numel() - int(finite.sum())
        raise CorruptError(
            f"{name} holds {bad:,} values that are NaN or infinite, of {finite.numel():,}",
            "the checkpoint is damaged or diverged in training: download or export it again",
        )


# ---- where the model is ----------------------------------------------------------------------------------------------------


def _locate(name: str, revision: str | None, trust_remote_code: bool, accepted_method: str | None) -> Path:
    """The directory of a model, downloaded if need be."""
    path = Path(name).expanduser()
    if path.is_dir():
        if revision is not None:
            raise SettingsError(f"{name} is a local directory, which has no revision {revision}", "leave the revision out")
        if not (path / CONFIG_FILE).is_file():
            raise QtipError(
                f"{path} has no {CONFIG_FILE}, so it is not a Hugging Face model directory", _where_models_are(path)
            )
        return path
    if path.exists():
        raise QtipError(f"{name} is a file, not a model directory", f"give the directory that holds it: {path.parent}")
    if _looks_local(name):
        raise QtipError(f"{name} does not exist", near_folder(path) or "check the path, or give a Hub id such as org/model")
    return _download(name, revision, trust_remote_code, accepted_method)


def _looks_local(name: str) -> bool:
    return name.startswith(("/", "./", "../", "~", ".")) or name.endswith("/") or name.count("/") > 1 or "\\" in name


def _where_models_are(path: Path) -> str:
    """For a directory that is not a model: the one directly below that is, if there is any."""
    below = sorted(config.parent for config in path.glob(f"*/{CONFIG_FILE}"))
    return f"did you mean {below[0]}?" if below else f"give the directory that holds {CONFIG_FILE} and the .safetensors files"


def _download(name: str, revision: str | None, trust_remote_code: bool, accepted_method: str | None) -> Path:
    """Fetches a Hub model: first what is small, then exactly the weight files that its index names."""
    with hub_errors(name, revision):
        small = small_files(trust_remote_code)
        directory = Path(snapshot_download(name, revision=revision, allow_patterns=small, ignore_patterns=list(OTHER_COPIES)))
        if not (directory / CONFIG_FILE).is_file():
            raise QtipError(f"{name}{at(revision)} on the Hugging Face Hub has no {CONFIG_FILE}", "choose a transformers model")
        # Before gigabytes are fetched for nothing.
        _refuse_quantized(read_table(directory / CONFIG_FILE, AGAIN), name, accepted_method)
        index = directory / INDEX_FILE
        weights = sorted(set(index_weight_map(index).values())) if index.is_file() else [SINGLE_FILE]
        return Path(snapshot_download(name, revision=directory.name, allow_patterns=[*small, *weights]))


def small_files(trust_remote_code: bool) -> list[str]:
    """Patterns of all files of a repository but its weights."""
    return [*_SMALL_FILES, *(_CODE_FILES if trust_remote_code else ())]


# ---- what its config says --------------------------------------------------------------------------------------------------


def _refuse_quantized(config: dict[str, Any], name: str, accepted_method: str | None) -> None:
    """Refuses a checkpoint that carries quantization of any but the accepted method, also in a nested text config."""
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for part in parts:
        stated = part.get("quantization_config") or part.get("compression_config")
        if stated:
            method = stated.get("quant_method", "unnamed method") if isinstance(stated, dict) else "unnamed method"
            if method == accepted_method or method in dequantized.METHODS:
                continue
            raise QtipError(
                f"{name} is already quantized ({method})", "start from the original model with its bf16 or fp16 weights"
            )


def _load_config(directory: Path, name: str, trust_remote_code: bool) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    # Also what its checks of fields raise, which is of no common kind.
    except Exception as error:
        if "trust_remote_code" in str(error):
            hint = "read the .py files in it, then pass --trust-remote-code if you trust them"
            raise QtipError(f"{name} comes with its own code, which is not run unless you trust it", hint) from error
        fact = first_line(error)
        raise QtipError(f"transformers cannot read the config of {name}: {fact}", "a newer transformers may know it") from error


def _refuse_other_tasks(config: PreTrainedConfig, name: str) -> None:
    """Refuses what does not predict the next token from the ones before: encoders, encoder-decoders, classifiers."""
    auto_map = getattr(config, "auto_map", None)
    remote = isinstance(auto_map, dict) and "AutoModelForCausalLM" in auto_map
    named = getattr(config, "architectures", None)
    stated = [str(each) for each in named] if isinstance(named, list) else []
    known = remote or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    generates = remote or any(each.endswith(_GENERATING_CLASSES) for each in stated)
    # A config has `is_decoder` where the family is an encoder unless told otherwise (and in a few old decoder families).
    encoder = getattr(config, "is_encoder_decoder", False) or (getattr(config, "is_decoder", None) is False and not generates)
    other_head = stated and not generates and not any(each.endswith(_HEADLESS_CLASS) for each in stated)
    if not known or encoder or other_head:
        what = ", ".join(stated) or config.model_type
        raise QtipError(f"{name} is not a causal language model ({what})", "choose a model that AutoModelForCausalLM loads")


# ---- which tensors lie where -----------------------------------------------------------------------------------------------


def index_weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> shard file name, from the index, refusing names that lead out of the directory."""
    weight_map = read_table(index, AGAIN, unique=True).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CorruptError(f"{index} has no weight_map from tensors to files", AGAIN)
    for shard in set(weight_map.values()):
        if not is_inside(shard):
            raise CorruptError(f"{index} names a file outside the model directory: {shard}", "do not use this model's files")
    return weight_map


def _shard_contents(directory: Path, name: str) -> dict[Path, set[str]]:
    """The shards, and for each the tensors it must hold (none stated where there is no index)."""
    index = directory / INDEX_FILE
    if not index.is_file():
        if not (directory / SINGLE_FILE).is_file():
            raise _no_weights(directory, name)
        return {directory / SINGLE_FILE: set()}
    contents: dict[Path, set[str]] = {}
    for tensor, shard in index_weight_map(index).items():
        contents.setdefault(directory / shard, set()).add(tensor)
    missing = sorted(str(path.relative_to(directory)) for path in contents if not path.is_file())
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        hint = "download the model again, or wait until its download has finished"
        raise CorruptError(f"{name} lacks {missing[0]}{others}, which {INDEX_FILE} names", hint)
    return dict(sorted(contents.items()))


def _no_weights(directory: Path, name: str) -> QtipError:
    pickles = sorted(path.name for path in directory.iterdir() if path.suffix in _PICKLE_SUFFIXES)
    others = sorted(path.name for path in directory.glob("*.safetensors"))
    if pickles and not others:
        hint = "convert it: load it with transformers in a sandbox, save_pretrained writes safetensors"
        return QtipError(f"{name} has only pickled weights ({pickles[0]}), which are never opened: they can run code", hint)
    if others:
        hint = f"rename it to {SINGLE_FILE}, or write {INDEX_FILE}"
        return QtipError(f"{name} has neither {SINGLE_FILE} nor {INDEX_FILE}, only {others[0]}", hint)
    return QtipError(
        f"{name} has no weights: there is no {SINGLE_FILE}", "download the .safetensors files of the model as well"
    )


def _read_header(shard: Path, expected: set[str]) -> dict[str, StoredTensor]:
    """The tensors of one shard, from its header; safetensors checks there that the file is as long as it must be."""
    tensors: dict[str, StoredTensor] = {}
    try:
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is not a dict
                view = file.get_slice(name)
                if view.get_dtype() not in DTYPES:
                    hint = "start from the original model with its bf16 or fp16 weights"
                    raise QtipError(f"{shard}: {name} is stored as {view.get_dtype()}: the model is quantized already", hint)
                tensors[name] = StoredTensor(shard, tuple(view.get_shape()), DTYPES[view.get_dtype()])
    except OSError as error:
        raise storage_error(error, shard, "read") from error
    except SafetensorError as error:
        raise _corrupt_shard(shard, error) from error
    absent = sorted(expected - tensors.keys())
    if absent:
        raise CorruptError(f"{shard} does not hold {absent[0]}, which {INDEX_FILE} says it does", "download the model again")
    return tensors


def _corrupt_shard(shard: Path, error: SafetensorError) -> CorruptError:
    """Says what is wrong with a shard that safetensors refuses; a Git LFS pointer in its place is the usual surprise."""
    with shard.open("rb") as file:
        start = file.read(40)
    if start.startswith(b"version https://git-lfs"):
        return CorruptError(f"{shard} is a Git LFS pointer, not the weights", "run `git lfs pull` in the model's directory")
    return CorruptError(f"{shard} is truncated or damaged ({error})", "download or export this file again")
