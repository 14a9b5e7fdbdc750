"""Owns shards: tensors in a safetensors file that is complete or absent, and is never believed without a check.

The same tensors and metadata give the same bytes, whatever the run and the order of the dict.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from qtipcli.errors import CorruptError
from qtipcli.job.files import sha256_file, write_atomic
from qtipcli.job.header import REMEDY, build_header, read_header

# The dtypes of torch that safetensors stores, by its names.
_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_shard(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write `tensors` to the safetensors file `path`, complete or not at all.

    Args:
        tensors: name -> tensor of any shape, device and strides, in a dtype that safetensors has. They are written one by
            one: no second copy of the shard is made in memory.
        metadata: text -> text for the header. `format: pt`, which transformers asks for, is always added.

    Returns the file's sha256 as hex. Raises StorageError (disk full, no permission ...): then nothing is left behind.
    """
    names, header, _ = _layout(tensors, metadata)

    def chunks() -> Iterator[bytes | memoryview]:
        yield header
        for name in names:
            yield _tensor_bytes(tensors[name])

    return write_atomic(Path(path), chunks())[0]


def shard_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> int:
    """The size of the file that `write_shard` makes of these; the tensors may be on meta."""
    _, header, content = _layout(tensors, metadata)
    return len(header) + content


def _layout(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> tuple[list[str], bytes, int]:
    """(the names in the order in which tensors are written, the header, bytes behind it)."""
    # Widest dtype first keeps every tensor aligned to its element size without padding between tensors.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    entries: dict[str, dict[str, Any]] = {}
    offset = 0
    for name in names:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    return names, build_header(entries, {"format": "pt", **(metadata or {})}), offset


def _tensor_bytes(tensor: Tensor) -> memoryview:
    """The tensor's elements in row-major order, as bytes; a view wherever that is possible."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())


def check_shard(path: Path, sha256: str | None = None) -> None:
    """Raise CorruptError, naming `path`, unless it is a whole safetensors file and, where given, has this checksum."""
    read_header(Path(path))
    if sha256 is not None and (actual := sha256_file(path)) != sha256:
        raise CorruptError(f"{path} is damaged: its sha256 is {actual[:12]}... where {sha256[:12]}... was written", REMEDY)


def read_shard(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """All tensors of the safetensors file `path`, on the CPU, in the dtypes and shapes written.

    Raises CorruptError, naming the file, if it is cut off, changed (where `sha256` is given) or not such a file;
    StorageError if it cannot be read.
    """
    check_shard(path, sha256)
    with _safetensors_errors(path):
        return load_file(path)


@contextlib.contextmanager
def open_shard(path: Path) -> Iterator[Any]:
    """The safetensors file `path` as a lazy reader with `keys()`, `get_tensor(name)`, `get_slice(name)` and `metadata()`.

    Its size and header are checked, its content is not: `check_shard` does that. Raises CorruptError, StorageError.
    """
    read_header(Path(path))
    with _safetensors_errors(path), safe_open(path, framework="pt") as reader:
        yield reader


@contextlib.contextmanager
def _safetensors_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise CorruptError(f"{path} is not a readable safetensors file: {error}", REMEDY) from error
