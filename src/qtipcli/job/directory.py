"""Owns the run directory: which job it holds, what of it is done, and which of the files in it are its own.

    job.json       stage, settings, fingerprint: written once, never changed; on resume the only source of settings
    ledger.jsonl   one line for each finished shard, with its sha256 and the stage's report
    lock           present while a process writes
    KEY.safetensors

A commit writes the shard first and its ledger line second, each durable before the next. A process killed anywhere leaves at
most a temporary file, a shard without a line or a torn last line; opening removes all three, and that step is done again.
"""

from __future__ import annotations

import contextlib
import datetime
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from qtipcli.errors import CorruptError, MismatchError, QtipError, SettingsError, StorageError, storage_error
from qtipcli.job.files import is_temporary, make_directory, remove_temporary, write_text_atomic
from qtipcli.job.fingerprint import package_version
from qtipcli.job.header import read_header
from qtipcli.job.ledger import Entry, Ledger, shard_name
from qtipcli.job.lock import Lock
from qtipcli.job.record import checksum, differences, encode, normalized
from qtipcli.job.shards import check_shard, open_shard, read_shard, write_shard
from qtipcli.untrusted import open_regular, parse_json

_JOB, _LEDGER, _LOCK = "job.json", "ledger.jsonl", "lock"
_JOB_FIELDS = {"qtip", "stage", "settings", "fingerprint", "created"}
_SHARD_MARK = "qtip_shard"  # metadata of every shard: its key; by this a run directory knows its own shards from others
_REDO = "give the same command with --force: only what is damaged is done again"
_MOST_DIFFERENCES = 8


class RunDirectory:
    """One job on disk. Made by `open` (to work, holding the lock) or `load` (to read); a context manager.

    path: the directory. stage, settings, fingerprint, created: as frozen in job.json, plain JSON values.
    """

    def __init__(self, path: Path, job: Mapping[str, Any], ledger: Ledger, lock: Lock | None) -> None:
        self.path = path
        self.stage: str = job["stage"]
        self.settings: dict[str, Any] = job["settings"]
        self.fingerprint: dict[str, Any] = job["fingerprint"]
        self.created: str = job["created"]
        self._ledger = ledger
        self._lock = lock

    @classmethod
    def open(
        cls,
        path: Path,
        stage: str,
        settings: Mapping[str, Any],
        fingerprint: Mapping[str, Any],
        force: bool = False,
        repair: bool = False,
    ) -> RunDirectory:
        """Create the job, or go on with it if the directory holds the same one.

        Args:
            path: the directory; it and its parents are made.
            stage: the command that works here.
            settings, fingerprint: nested dicts of JSON values (tuples and one-element tensors or arrays are accepted).
            repair: drop what is damaged from the ledger, so that it is done again, instead of raising CorruptError.
            force: repair; and replace a job that differs; and work in a directory that holds other files. Only files that a
                run directory wrote are ever deleted. A job that is the same is continued even so: doing its finished shards
                again would give the same bytes.

        Every finished shard is checked to the last bit.

        Raises MismatchError (another stage, settings or fingerprint; each field named), BusyError, CorruptError,
        SettingsError (the directory holds files that are not a job's), StorageError.
        """
        path = Path(path)
        asked = {"stage": stage, "settings": normalized(settings), "fingerprint": normalized(fingerprint)}
        is_made_here = _prepare(path, force)
        lock = None
        try:
            lock = Lock(path / _LOCK)
            _refuse_others_files(path, force)  # again: before the lock was ours, another process could write
            remove_temporary(path)
            job = _readable_job(path, force)
            if job is None or not _same_job(path, job, asked, force):
                job = _start_job(path, asked)
            run = cls(path, job, Ledger(path / _LEDGER, repair or force), lock)
            run._ledger.mend()
            _delete_strays(path, run.keys())
            run._settle_damage(repair=force or repair)
        except BaseException:
            if lock is not None:
                lock.release()
            if is_made_here:
                with contextlib.suppress(OSError):  # not empty: then job.json is there and the job can go on
                    path.rmdir()
            raise
        return run

    @classmethod
    def load(cls, path: Path, stage: str | None = None) -> RunDirectory:
        """Open an existing job for reading, without the lock; what another process finishes later is not seen.

        Raises QtipError if there is no job, MismatchError if it is one of another stage than `stage`, CorruptError.
        """
        path = Path(path)
        job = _read_job(path)
        if job is None:
            raise QtipError(f"{path} is not a qtip run directory: it has no {_JOB}", "check the path")
        if stage is not None and job["stage"] != stage:
            raise MismatchError(f"{path} holds a {job['stage']} job, not a {stage} job", "check the path")
        return cls(path, job, Ledger(path / _LEDGER), lock=None)

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock; everything is on disk already."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def refresh(self) -> None:
        """See what the process that writes has finished since this directory was opened for reading. Raises CorruptError."""
        self._ledger = Ledger(self.path / _LEDGER)

    def keys(self) -> list[str]:
        """The keys of finished shards, in the order in which they were done."""
        return list(self._ledger.entries)

    def done(self, key: str) -> bool:
        """Whether the shard `key` is finished."""
        return key in self._ledger.entries

    def report(self, key: str) -> dict[str, Any]:
        """What was reported with the finished shard `key`. Raises QtipError if it is not done."""
        return self._entry(key).report

    def shard(self, key: str) -> Path:
        """The path of the finished shard `key`. Raises QtipError if it is not done."""
        return self.path / self._entry(key).file

    def read(self, key: str) -> dict[str, Tensor]:
        """The tensors of the finished shard `key`, on the CPU, after its checksum was verified.

        Raises CorruptError, naming the shard, if it is missing, cut off or changed; QtipError if it is not done.
        """
        self._check(key, in_full=False)
        with _redo_hint():
            return read_shard(self.shard(key), self._entry(key).sha256)

    @contextlib.contextmanager
    def open_shard(self, key: str) -> Iterator[Any]:
        """The finished shard `key` as a lazy reader (see `shards.open_shard`).

        Size and header are checked here, content by `verify`.
        """
        self._check(key, in_full=False)
        with _redo_hint(), open_shard(self.shard(key)) as reader:
            yield reader

    def commit(
        self,
        key: str,
        tensors: Mapping[str, Tensor],
        report: Mapping[str, Any] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Make `key` done: when this returns, its tensors and report survive a kill and a power cut.

        Args:
            key: letters, digits and . _ -; becomes the file name. Must not be done yet.
            tensors: name -> tensor; may be empty.
            report: JSON values. What must be reproducible holds no clock times; seconds here make only the ledger differ.
            metadata: text -> text, for the shard's header.

        Raises StorageError (disk full ...): then `key` is not done, what was done before is intact, and the job can go on.
        """
        path = self.path / shard_name(key)
        entry_report = normalized(dict(report or {}))
        self._require_lock()
        if self.done(key):
            raise ValueError(f"{key} is done already in {self.path}: forget it first")
        if path.exists() and not _is_own_shard(path):  # its own is what a failed commit left: written anew
            raise SettingsError(f"{path} is not this job's, and a result is to be written there", "move it away")
        sha256 = write_shard(path, tensors, {**(metadata or {}), _SHARD_MARK: key})
        self._ledger.append(Entry(key, path.name, path.stat().st_size, sha256, entry_report))

    def forget(self, *keys: str) -> None:
        """Make finished shards undone and delete them. Raises QtipError if one is not done, StorageError."""
        self._require_lock()
        paths = [self.shard(key) for key in keys]
        self._ledger.remove(keys)  # first: a line without its shard would be damage, a shard without its line is not
        for path in paths:
            _delete(path)

    def verify(self, key: str) -> None:
        """Raise CorruptError, naming the shard, unless the finished shard `key` is what was written, to the last bit."""
        self._check(key, in_full=True)

    def damaged(self, in_full: bool = True) -> dict[str, CorruptError]:
        """Key -> what is wrong, for every finished shard that is missing or changed.

        in_full: compare checksums, which reads everything; otherwise only sizes.
        """
        errors = {}
        for key in self.keys():
            try:
                self._check(key, in_full)
            except CorruptError as error:
                errors[key] = error
        return errors

    def _settle_damage(self, repair: bool) -> None:
        # In full, though that reads all that is finished: a job that says nothing of damage would call it done.
        damaged = self.damaged()
        if damaged and not repair:
            first = next(iter(damaged.values()))
            more = f", and {len(damaged) - 1} more" if len(damaged) > 1 else ""
            raise CorruptError(first.message + more, first.hint)
        if damaged:
            self.forget(*damaged)

    def _check(self, key: str, in_full: bool) -> None:
        entry = self._entry(key)
        path = self.path / entry.file
        try:
            size = path.stat().st_size
        except FileNotFoundError as error:
            raise CorruptError(f"{path} is missing, but the ledger says that it is done", _REDO) from error
        except OSError as error:
            raise storage_error(error, path, "read") from error
        if size != entry.bytes:
            raise CorruptError(f"{path} is damaged: {size} bytes where {entry.bytes} were written", _REDO)
        if in_full:
            with _redo_hint():
                check_shard(path, entry.sha256)

    def _entry(self, key: str) -> Entry:
        if key not in self._ledger.entries:
            raise QtipError(f"{key} is not done in {self.path}", "give the command that makes it again")
        return self._ledger.entries[key]

    def _require_lock(self) -> None:
        if self._lock is None:
            raise ValueError(f"{self.path} is open for reading only")


@contextlib.contextmanager
def _redo_hint() -> Iterator[None]:
    """A damaged shard of a job has another remedy than a damaged file that came from elsewhere."""
    try:
        yield
    except CorruptError as error:
        raise CorruptError(error.message, _REDO) from error


def _prepare(path: Path, force: bool) -> bool:
    """Make the directory unless it is there; returns whether this made it. Raises SettingsError, StorageError."""
    try:
        if path.exists() and not path.is_dir():
            raise SettingsError(f"{path} is a file; a run directory was expected", "choose another path")
        _refuse_others_files(path, force)  # before anything of ours is in the directory
        return make_directory(path)
    except OSError as error:
        raise storage_error(error, path) from error


def _refuse_others_files(path: Path, force: bool) -> None:
    """Raise SettingsError if the directory holds files of others: any without `force`, with it those that we would replace."""
    try:
        names = {file.name for file in path.iterdir() if not is_temporary(file)} if path.exists() else set()
        lock_text = (path / _LOCK).read_bytes() if _LOCK in names else b""
    except OSError as error:
        raise storage_error(error, path, "read") from error
    if _JOB in names:
        _readable_job(path, force)
        return
    in_the_way = {_LEDGER} & names
    if lock_text and not Lock.wrote(lock_text):
        in_the_way.add(_LOCK)
    if in_the_way:
        raise SettingsError(f"{path / min(in_the_way)} is not a qtip job's file", "choose another directory")
    if names - {_LOCK} and not force:
        raise SettingsError(
            f"{path} is not empty and is not a qtip run directory",
            "choose another directory, or --force to work beside what is in it",
        )


def _read_job(path: Path) -> dict[str, Any] | None:
    """What job.json says; None if there is none. Raises CorruptError, SettingsError (another program's), StorageError."""
    file = path / _JOB
    try:
        with open_regular(file, "choose another directory") as opened:
            text = opened.read()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise storage_error(error, file, "read") from error
    try:
        job = parse_json(text, unique=True)
    except ValueError as error:
        raise CorruptError(
            f"{file} is damaged: it is not JSON", "choose another directory, or --force to start again"
        ) from error
    lacking = _JOB_FIELDS - job.keys() if isinstance(job, dict) else _JOB_FIELDS
    check = job.pop("check", None) if len(lacking) <= 1 else None  # absent from older jobs; one name may be what is damaged
    if check is not None and check != checksum(job):
        raise CorruptError(
            f"{file} is damaged: it is not what was written", "choose another directory, or --force to start again"
        )
    if lacking or type(job["stage"]) is not str:
        raise SettingsError(f"{file} is not a qtip job's file", "choose another directory")
    if not all(isinstance(job[part], dict) for part in ("settings", "fingerprint")):
        raise CorruptError(
            f"{file} is damaged: its settings are no table", "choose another directory, or --force to start again"
        )
    return job


def _readable_job(path: Path, force: bool) -> dict[str, Any] | None:
    """As `_read_job`; with `force` a damaged job.json counts as one that differs from every job."""
    try:
        return _read_job(path)
    except CorruptError:
        if not force:
            raise
        return dict.fromkeys(_JOB_FIELDS)


def _same_job(path: Path, job: Mapping[str, Any], asked: Mapping[str, Any], force: bool) -> bool:
    """Whether the stored job is the one asked for. Raises MismatchError, naming each field that differs, unless `force`."""
    found = list(differences({field: job[field] for field in asked}, asked))
    if found and not force:
        shown = "; ".join(found[:_MOST_DIFFERENCES])
        more = f"; and {len(found) - _MOST_DIFFERENCES} more" if len(found) > _MOST_DIFFERENCES else ""
        raise MismatchError(
            f"{path} holds another job: {shown}{more}",
            "use the same model, data and settings, choose another directory, or --force to start again",
        )
    return not found


def _start_job(path: Path, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Freeze the job, after deleting what a job that it replaces has done: its ledger first, so that nothing can mix."""
    replaced = Ledger(path / _LEDGER, repair=True)
    _delete(path / _LEDGER)
    for entry in replaced.entries.values():
        _delete(path / entry.file)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    job = {"qtip": package_version("qtipcli"), "created": now, **asked}
    job |= {"check": checksum(job)}
    write_text_atomic(path / _JOB, json.dumps(json.loads(encode(job)), indent=2) + "\n")
    return job


def _delete_strays(path: Path, keys: list[str]) -> None:
    """Delete shards that have no ledger line, known as a job's own by the mark in their header; files of others stay."""
    keep = set(map(shard_name, keys))
    for file in sorted(path.glob("*.safetensors")):
        if file.name not in keep and _is_own_shard(file):
            _delete(file)


def _is_own_shard(file: Path) -> bool:
    try:
        return read_header(file).metadata.get(_SHARD_MARK) == file.stem
    except (CorruptError, StorageError):
        return False


def _delete(file: Path) -> None:
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        raise storage_error(error, file) from error
