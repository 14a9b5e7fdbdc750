"""Owns how a valid directory is broken: a case is a list of breaks in JSON, so that a failure can be kept and given again.

A break that does not apply to what earlier ones left does nothing.
"""

from __future__ import annotations

import copy
import hashlib
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fuzz import documents

Break = Mapping[str, Any]
Content = dict[str, bytes]
_DOES_NOT_APPLY = (LookupError, TypeError, ValueError, AttributeError, RecursionError, struct.error)


class Broken:
    """The files of a directory in memory, and what is put beside them when it is written."""

    def __init__(self, content: Mapping[str, bytes]) -> None:
        self.files: Content = dict(content)
        self.links: dict[str, str] = {}
        self.odd: dict[str, str] = {}

    def write(self, directory: Path) -> None:
        """Make the directory."""
        directory.mkdir()
        for name, data in self.files.items():
            _made(directory, name).write_bytes(data)
        for name, target in self.links.items():
            _made(directory, name).symlink_to(target.replace("$HERE", str(directory)))
        for name, kind in self.odd.items():
            os.mkfifo(_made(directory, name)) if kind == "fifo" else _made(directory, name).mkdir()

    def take(self, name: str) -> None:
        self.files.pop(name, None)
        self.links.pop(name, None)
        self.odd.pop(name, None)


def broken(content: Mapping[str, bytes], breaks: Sequence[Break], is_sealed: bool = False) -> Broken:
    """The directory after the breaks. is_sealed: recorded checksums and sizes are made right again, so that more is reached."""
    result = Broken(content)
    for each in breaks:
        try:
            _DO[each["do"]](result, each)
        except _DOES_NOT_APPLY:
            continue
    if is_sealed:
        _seal(result)
    return result


def _made(directory: Path, name: str) -> Path:
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink() or path.exists():
        path.unlink()
    return path


# In a document


def _in_document(change: Callable[[Any, Break], Any]) -> Callable[[Broken, Break], None]:
    def apply(result: Broken, each: Break) -> None:
        name = each["file"]
        document = copy.deepcopy(documents.taken_apart(name, result.files[name]))
        result.files[name] = documents.put_together(name, change(document, each), result.files[name])

    return apply


def _set(document: Any, each: Break) -> Any:
    *way, last = each["at"] or [None]
    if last is None:
        return each["value"]
    documents.at(document, way)[last] = each["value"]
    return document


def _delete(document: Any, each: Break) -> Any:
    *way, last = each["at"]
    del documents.at(document, way)[last]
    return document


def _copy(document: Any, each: Break) -> Any:
    return _set(document, {"at": each["at"], "value": copy.deepcopy(documents.at(document, each["source"]))})


def _rename(document: Any, each: Break) -> Any:
    *way, last = each["at"]
    table = documents.at(document, way)
    table[each["to"]] = table.pop(last)
    return document


def _twice(document: Any, each: Break) -> Any:
    """The same key a second time, with another value."""
    *way, last = each["at"]
    table = documents.at(document, way)
    pairs = [*table.items(), (last, each["value"])]
    return _set(document, {"at": way, "value": {documents.PAIRS: pairs}})


def _step(document: Any, each: Break) -> Any:
    return _set(document, {"at": each["at"], "value": documents.at(document, each["at"]) + each["by"]})


# In a file


def _flip(result: Broken, each: Break) -> None:
    data = bytearray(result.files[each["file"]])
    data[each["place"] % len(data)] ^= each["mask"]
    result.files[each["file"]] = bytes(data)


def _cut(result: Broken, each: Break) -> None:
    data = result.files[each["file"]]
    result.files[each["file"]] = data[: each["place"] % (len(data) + 1)]


def _append(result: Broken, each: Break) -> None:
    result.files[each["file"]] += bytes.fromhex(each["hex"])


def _replace(result: Broken, each: Break) -> None:
    result.files[each["file"]] = each["text"].encode("utf-8", "surrogatepass")


def _repeat(result: Broken, each: Break) -> None:
    result.files[each["file"]] = (each["text"] * each["times"] + each.get("end", "")).encode("utf-8", "surrogatepass")


def _length(result: Broken, each: Break) -> None:
    """A safetensors header says another length than it has."""
    data = result.files[each["file"]]
    header = data[8 : len(data) - len(documents.tensor_bytes(data))]
    result.files[each["file"]] = documents.with_header(header, documents.tensor_bytes(data), each["value"])


def _fill(result: Broken, each: Break) -> None:
    """Every byte pair of one tensor becomes the two bytes given: 007e is a NaN of fp16, 007c its infinity."""
    data = result.files[each["file"]]
    first, end = documents.taken_apart(each["file"], data)[each["tensor"]]["data_offsets"]
    start = len(data) - len(documents.tensor_bytes(data))
    if end > first and start + end <= len(data):
        two = bytes.fromhex(each["hex"])
        result.files[each["file"]] = data[: start + first] + (two * (end - first))[: end - first] + data[start + end :]


def _remove(result: Broken, each: Break) -> None:
    result.take(each["file"])


def _move(result: Broken, each: Break) -> None:
    data = result.files[each["file"]]
    if not each.get("keep"):
        result.take(each["file"])
    if not each["to"].startswith("/") and ".." not in each["to"]:
        result.files[each["to"]] = data


def _link(result: Broken, each: Break) -> None:
    result.take(each["file"])
    result.links[each["file"]] = each["to"]


def _odd(result: Broken, each: Break) -> None:
    result.take(each["file"])
    result.odd[each["file"]] = each["kind"]


_DO: dict[str, Callable[[Broken, Break], None]] = {
    "set": _in_document(_set),
    "delete": _in_document(_delete),
    "copy": _in_document(_copy),
    "rename": _in_document(_rename),
    "twice": _in_document(_twice),
    "step": _in_document(_step),
    "flip": _flip,
    "cut": _cut,
    "append": _append,
    "replace": _replace,
    "repeat": _repeat,
    "length": _length,
    "fill": _fill,
    "remove": _remove,
    "move": _move,
    "link": _link,
    "odd": _odd,
}


def _seal(result: Broken) -> None:
    """Write the sha256 of each file where qtip.json and the ledger record them, as an attacker would."""
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in result.files.items()}
    try:
        if "qtip.json" in result.files:
            record = documents.taken_apart("qtip.json", result.files["qtip.json"])
            for name in set(record["sha256"]) & set(sums):
                record["sha256"][name] = sums[name]
            result.files["qtip.json"] = documents.put_together("qtip.json", record, b"")
        if "ledger.jsonl" in result.files:
            lines = documents.taken_apart("ledger.jsonl", result.files["ledger.jsonl"])
            for line in lines:
                if line["file"] in sums:
                    line |= {"sha256": sums[line["file"]], "bytes": len(result.files[line["file"]])}
            result.files["ledger.jsonl"] = documents.put_together("ledger.jsonl", lines, b"")
    except _DOES_NOT_APPLY:
        return
