"""Owns the first look at files that somebody else wrote: how much is read, what JSON is taken, which names and links lead out.

Everything downloaded is read through here or through safetensors' own reader. What it refuses is in docs/format.md, section 9.
No torch here.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any

from qtipcli.errors import CorruptError, storage_error

LARGEST_BYTES = 100_000_000
"""Of a file that is read whole: safetensors' own limit for a header, and ten times the index of the largest models."""

DEEPEST = 64
"""Levels of tables and lists in each other; the deepest honest file has eight."""

LARGEST_SIZES = {
    r"(num_)?(hidden_|decoder_|mtp_)?(layers|blocks)|num_.*_layers|n_layers?|n_blocks": 4096,
    r"num_.*heads|n_heads?|.*head_dim|num_.*experts(_.*)?|.*_experts|.*_rank": 2**16,
    r"hidden_size|n_embd|d_model|.*_hidden_size": 2**20,
    r"intermediate_size|.*_intermediate_size|n_inner|d_ff|ffn_dim": 2**24,
    r"vocab_size|.*_vocab_size": 2**27,
}
"""Fields of a config, by the names that transformers' families give them -> more than any model has."""

_BLOBS = re.compile(r"(?P<model>.*/models--[^/]+)/snapshots/[^/]+")
"""A snapshot in the Hub's cache, whose files are links to ../../blobs/."""


def read_whole(path: Path, hint: str) -> bytes:
    """The content of a regular file. Raises CorruptError where it is something else or too large, StorageError."""
    try:
        with open_regular(path, hint) as file:
            content = file.read(LARGEST_BYTES + 1)
    except OSError as error:
        raise storage_error(error, path, "read") from error
    if len(content) > LARGEST_BYTES:
        raise CorruptError(f"{path} is larger than {LARGEST_BYTES:,} bytes, as no such file is", hint)
    return content


def open_regular(path: Path, hint: str) -> Any:
    """The file, to read bytes from. Raises CorruptError for a pipe or device, on which reading may never end; OSError."""
    # Without waiting for a writer, if it is a pipe.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise CorruptError(f"{path} is a directory where a file was expected", hint)
        if not stat.S_ISREG(mode):
            raise CorruptError(f"{path} is no regular file", hint)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def parse_json(text: bytes | str, unique: bool = False) -> Any:
    """The value. unique: refuse a table with the same key twice, of which others may take the other one.

    Raises ValueError for everything that is no JSON, also where it is nested too deeply.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique if unique else None)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if is_deep(value):
        raise ValueError("it is nested too deeply")
    return value


def is_deep(value: Any) -> bool:
    """Whether tables and lists in a JSON value lie deeper in each other than DEEPEST, where copying it would fail."""
    level = [value]
    for _ in range(DEEPEST):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return False
    return True


def read_table(path: Path, hint: str, unique: bool = False) -> dict[str, Any]:
    """The JSON object in a file. Raises CorruptError where it holds none, StorageError where it cannot be read."""
    try:
        content = parse_json(read_whole(path, hint).decode("utf-8"), unique)
    except ValueError as error:
        raise CorruptError(f"{path} is not JSON: {error}", hint) from error
    if not isinstance(content, dict):
        raise CorruptError(f"{path} holds no JSON object", hint)
    return content


def is_inside(name: str) -> bool:
    """Whether a file's name, as an index states it, stays in the directory.

    By the name alone: in the Hub's cache every file is itself a link out of the snapshot.
    """
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and not {"\\", "\0"} & set(name)


def refuse_impossible(config: dict[str, Any], name: str) -> None:
    """Raise CorruptError where a model's config states a size that no model has, at any depth of it.

    transformers builds as many modules, and computes as many frequencies, as a config says, before it looks for weights.
    """
    parts = [config]
    while parts:
        part = parts.pop()
        parts += [value for key, value in part.items() if isinstance(value, dict) and key != "quantization_config"]
        for key, value in part.items():
            largest = next((most for pattern, most in LARGEST_SIZES.items() if re.fullmatch(pattern, str(key))), None)
            if largest is not None and type(value) in (int, float) and value > largest:
                fact = f"the config of {name} states {key} {value!r}: no model has more than {largest:,}"
                raise CorruptError(fact, "download or export the model again")


def led_out(file: Path, directory: Path) -> Path | None:
    """Where a link in `directory` leads, if that is outside of it; None for all else.

    In a snapshot of the Hub's cache the blobs of the same model count as inside.
    """
    real, inside = file.resolve(), directory.resolve()
    snapshot = _BLOBS.fullmatch(str(inside))
    homes = [inside, *([Path(snapshot["model"]) / "blobs"] if snapshot else [])]
    return None if any(real.is_relative_to(home) for home in homes) else real


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"it has {name!r} twice")
    return table
