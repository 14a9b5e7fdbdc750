"""Owns how a packed directory comes to be: by one process at a time, complete or absent, and durable when it is there.

Also the check behind "complete already": a result that was damaged since is never called complete.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from qtipcli.errors import CorruptError, SettingsError, storage_error
from qtipcli.job.files import make_directory, sha256_file, sync_directory, sync_tree
from qtipcli.job.header import read_header
from qtipcli.job.interrupt import interruptible
from qtipcli.job.lock import Lock
from qtipcli.untrusted import is_inside

RECORD_FILE = "qtip.json"
"""What was done: the job's settings and fingerprint, a report for each layer, the sha256 of each file."""

INDEX_FILE = "model.safetensors.index.json"

REMEDY = "quantize or pack it again with --force, or download it again"


@contextlib.contextmanager
def only_writer(out: Path) -> Iterator[None]:
    """Inside, no other process writes to `out`, and what a killed one left beside it is gone.

    Raises BusyError, StorageError.
    """
    partial, replaced = _partial(out), _replaced(out)
    try:
        make_directory(out.parent)
        lock = Lock(out.with_name(f".{out.name}.lock"), out)
    except OSError as error:
        raise storage_error(error, out) from error
    try:
        shutil.rmtree(partial, ignore_errors=True)
        if replaced.exists() and not out.exists():  # killed between two renames
            replaced.rename(out)
        shutil.rmtree(replaced, ignore_errors=True)
        yield
    except OSError as error:
        raise storage_error(error, out) from error
    finally:
        lock.release()


@contextlib.contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """An empty directory to write to, which takes the place of `out` at the end; after any exception `out` is as it was.

    When this returns, a power cut no longer changes it. Call it inside `only_writer`.
    Raises StorageError, and StoppedError after Ctrl-C.
    """
    partial, replaced = _partial(out), _replaced(out)
    try:
        with interruptible():
            partial.mkdir()
            yield partial
            sync_tree(partial)  # before the rename: its name must not survive without its bytes
            if out.exists():
                out.rename(replaced)
            partial.rename(out)
            sync_directory(out.parent)
            shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        raise storage_error(error, out) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_occupied(out: Path, force: bool) -> None:
    """Raise SettingsError where `out` is a file or holds files; with `force` only where it is a file."""
    if out.exists() and not out.is_dir():
        raise SettingsError(f"{out} is a file", "choose another directory")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise SettingsError(f"{out} is not empty", "choose another directory, or --force to replace what is in it")


def check_files(directory: Path, checksums: Mapping[str, str]) -> None:
    """Raise CorruptError, naming it, where a file is not the one whose sha256 is recorded."""
    for name, expected in checksums.items():
        if not is_inside(name):
            raise CorruptError(
                f"{RECORD_FILE} names a file outside the model directory: {name}", "do not use this model's files"
            )
        if not (directory / name).is_file():
            raise CorruptError(f"{directory / name} is missing", REMEDY)
        if sha256_file(directory / name) != expected:
            raise CorruptError(f"{directory / name} is damaged: its sha256 is not the one recorded", REMEDY)


def check_complete(out: Path, record: Mapping[str, Any], index: Callable[[], str | None]) -> None:
    """Raise CorruptError, naming the file, unless `out` is what was written, to the last bit.

    record: what qtip.json says but for its checksums. index: the text of the index, None where it is not to be checked; asked
    once all other files are sound. The card and the evaluations are not checked: they may change.
    """
    text = (out / RECORD_FILE).read_text(encoding="utf-8", errors="replace")
    try:
        checksums = dict(json.loads(text)["sha256"])
    except (ValueError, LookupError, TypeError) as error:
        raise CorruptError(f"{out / RECORD_FILE} is damaged: it has no checksums", REMEDY) from error
    check_files(out, checksums)
    for name, expected in ((RECORD_FILE, record_text(record, checksums)), (INDEX_FILE, index())):
        if expected is not None and not _holds(out / name, expected):
            raise CorruptError(f"{out / name} is damaged, or was changed: this job writes another one", REMEDY)


def _holds(file: Path, text: str) -> bool:
    return file.is_file() and file.read_bytes() == text.encode()


def record_text(record: Mapping[str, Any], checksums: Mapping[str, str]) -> str:
    """qtip.json as it is written."""
    return json.dumps({**record, "sha256": dict(checksums)}, indent=1) + "\n"


def index_found(directory: Path, parameters: int) -> dict[str, Any]:
    """The index that belongs to the shards that are there. Raises CorruptError where one is none."""
    headers = {file.name: read_header(file).tensors for file in sorted(directory.glob("*.safetensors"))}
    total = sum(max((entry["data_offsets"][1] for entry in tensors.values()), default=0) for tensors in headers.values())
    names = {name: file for file, tensors in headers.items() for name in tensors}
    return {"metadata": {"total_size": total, "total_parameters": parameters}, "weight_map": names}


def _partial(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")


def _replaced(out: Path) -> Path:
    return out.with_name(f"{out.name}.replaced")
