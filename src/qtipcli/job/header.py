"""Owns the header of a safetensors file: 8 bytes of length, that many bytes of JSON, then the tensors' bytes without a gap.

It is written here rather than by the safetensors package, which keeps metadata in a hash map whose order changes from run to
run, and reports a full disk as a text without an errno. Source: the format section of the safetensors README. No torch here.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtipcli.errors import CorruptError, storage_error
from qtipcli.untrusted import open_regular, parse_json

REMEDY = "fetch or make the file again"
_LENGTH = struct.Struct("<Q")
_ALIGNMENT_BYTES = 8  # the tensors begin at a multiple of this, so that a memory map can be used in place
_LARGEST_HEADER_BYTES = 100_000_000  # the limit that the safetensors package itself sets


@dataclass(frozen=True)
class Header:
    """What a safetensors file says about itself.

    metadata: text -> text. tensors: name -> {"dtype", "shape", "data_offsets"}. raw: the bytes as stored, length included.
    file_bytes: the size that the file must have.
    """

    metadata: Mapping[str, str]
    tensors: Mapping[str, Mapping[str, Any]]
    raw: bytes
    file_bytes: int


def build_header(tensors: Mapping[str, Mapping[str, Any]], metadata: Mapping[str, str]) -> bytes:
    """The bytes that come before the tensors; equal arguments, in any order of the metadata, give equal bytes."""
    content = {"__metadata__": dict(sorted(metadata.items())), **tensors}
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)
    return _LENGTH.pack(len(text)) + text


def read_header(path: Path) -> Header:
    """Read and check the header of the safetensors file `path`, without reading a tensor.

    Raises CorruptError if it is not such a file, or is shorter or longer than its header says; StorageError if unreadable.
    """
    try:
        with open_regular(path, REMEDY) as file:
            actual_bytes = os.fstat(file.fileno()).st_size
            length_bytes = file.read(_LENGTH.size)
            length = _LENGTH.unpack(length_bytes)[0] if len(length_bytes) == _LENGTH.size else 0
            text = file.read(min(length, _LARGEST_HEADER_BYTES, actual_bytes))
    except OSError as error:
        raise storage_error(error, path, "read") from error
    try:
        if not 0 < length == len(text):
            raise ValueError
        content = parse_json(text, unique=True)
        metadata = content.pop("__metadata__", {})
        file_bytes = len(length_bytes) + length + _checked(metadata, content)
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise CorruptError(f"{path} is not a safetensors file: its header is damaged or cut off", REMEDY) from error
    if actual_bytes != file_bytes:
        raise CorruptError(f"{path} is damaged: {actual_bytes} bytes where its header says {file_bytes}", REMEDY)
    return Header(metadata, content, length_bytes + text, file_bytes)


def _checked(metadata: Any, tensors: Mapping[str, Any]) -> int:
    """The bytes of all tensors. Raises ValueError, TypeError or LookupError unless they lie end to end, as the format says."""
    texts = [*metadata.keys(), *metadata.values(), *(tensor["dtype"] for tensor in tensors.values())]
    numbers = [number for tensor in tensors.values() for number in (*tensor["shape"], *tensor["data_offsets"])]
    if not all(type(text) is str for text in texts) or not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError
    "".join([*texts, *tensors]).encode()  # half a character, which JSON can write, is no text
    end = 0
    for first, last in sorted(tuple(tensor["data_offsets"]) for tensor in tensors.values()):
        if first != end or last < first:
            raise ValueError
        end = last
    return end
