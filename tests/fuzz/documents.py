"""Owns how the files of a model are taken apart and written again with what no honest writer writes: twice the same key, NaN,
numbers of ten thousand digits, a header that lies about its length.

A document is a JSON value. Two tables stand for what JSON values cannot say: {"$raw": TEXT} is written as TEXT, and
{"$pairs": [[KEY, VALUE], ...]} as a table with exactly these entries, in this order, a key twice if need be.
"""

from __future__ import annotations

import json
import struct
from typing import Any

RAW, PAIRS = "$raw", "$pairs"
_LENGTH = struct.Struct("<Q")


def written(document: Any) -> str:
    """The text of a document; without the two special tables what json.dumps with sorted keys writes."""
    if isinstance(document, dict):
        if RAW in document:
            return str(document[RAW])
        pairs = document[PAIRS] if PAIRS in document else sorted(document.items())
        return "{" + ", ".join(f"{json.dumps(key)}: {written(value)}" for key, value in pairs) + "}"
    if isinstance(document, list):
        return "[" + ", ".join(map(written, document)) + "]"
    return json.dumps(document)


def taken_apart(name: str, content: bytes) -> Any:
    """The document in a file: of .jsonl a list of lines, of .safetensors the header; None for a file that is no document."""
    if name.endswith(".json"):
        return json.loads(content)
    if name.endswith(".jsonl"):
        return [json.loads(line) for line in content.splitlines()]
    if name.endswith(".safetensors"):
        return json.loads(content[8 : 8 + _LENGTH.unpack_from(content)[0]])
    return None


def put_together(name: str, document: Any, content: bytes) -> bytes:
    """The file with this document in the place of the one in `content`; tensors stay as they are."""
    if name.endswith(".jsonl"):
        lines = document if isinstance(document, list) else [document]
        return "".join(written(line) + "\n" for line in lines).encode("utf-8", "surrogatepass")
    text = written(document).encode("utf-8", "surrogatepass")
    return with_header(text, tensor_bytes(content)) if name.endswith(".safetensors") else text


def with_header(header: bytes, tensors: bytes, length: int | None = None) -> bytes:
    """A safetensors file; length: what it says its header has, in bytes."""
    return _LENGTH.pack(len(header) if length is None else length % 2**64) + header + tensors


def tensor_bytes(content: bytes) -> bytes:
    """What stands behind the header of a safetensors file."""
    return content[8 + _LENGTH.unpack_from(content)[0] :]


def tensors_of(content: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    """Name -> (dtype, shape, bytes) of a whole safetensors file, read by definition: the oracle of what a loader must hold."""
    data = tensor_bytes(content)
    header = taken_apart(".safetensors", content)
    return {
        name: (entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def places(document: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path to every value in a document, itself first; of long lists the first and last four entries."""
    found = [at]
    if isinstance(document, dict):
        entries = list(document.items())
    elif isinstance(document, list):
        entries = [(place, document[place]) for place in range(len(document)) if place < 4 or place >= len(document) - 4]
    else:
        return found
    for key, value in entries:
        found += places(value, (*at, key))
    return found


def at(document: Any, path: list[Any] | tuple[Any, ...]) -> Any:
    """The value at a path; KeyError, IndexError or TypeError where there is none."""
    for key in path:
        document = document[key]
    return document
