"""Owns records: how settings, fingerprints and ledger entries become JSON text, and how two of them are told apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

_ABSENT = object()
_CHECK_DIGITS = 16  # it finds accidents: one in 2^64 is missed
_LONGEST_VALUE = 60  # characters of a value that are shown in a message


def encode(record: Any) -> str:
    """One line of JSON: sorted keys and ASCII, so that equal records are equal bytes on every machine.

    NaN and infinity are written as Python writes them: a layer whose loss is not finite must be recorded, not stop the job.
    Numbers of numpy and torch become Python's. Raises TypeError for anything else that JSON does not have.
    """
    return json.dumps(record, sort_keys=True, default=_plain)


def checksum(record: Any) -> str:
    """Tells whether a record is what was written: the start of the sha256 of its encoding, as hex."""
    return hashlib.sha256(encode(record).encode()).hexdigest()[:_CHECK_DIGITS]


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"a {type(value).__name__} has no place in a record: {value!r}")


def normalized(record: Any) -> Any:
    """The record as it will be read back: tuples are lists, keys are text."""
    return json.loads(encode(record))


def differences(stored: Any, asked: Any, name: str = "") -> Iterator[str]:
    """One phrase for each field in which two normalized records differ; nested fields have dotted names."""
    if isinstance(stored, Mapping) and isinstance(asked, Mapping):
        for key in sorted(stored.keys() | asked.keys()):
            yield from differences(stored.get(key, _ABSENT), asked.get(key, _ABSENT), f"{name}.{key}" if name else key)
    elif stored is _ABSENT or asked is _ABSENT or encode(stored) != encode(asked):
        yield f"{name} is {_shown(stored)} there and {_shown(asked)} here"


def _shown(value: Any) -> str:
    text = "absent" if value is _ABSENT else json.dumps(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."
