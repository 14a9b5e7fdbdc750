"""Owns the push stage: a packed directory that was checked becomes one commit of a repository on the Hugging Face Hub.

Large files are sent one by one before that, and the Hub keeps them for the commit; so a push that was killed goes on where it
was, and a reader of the repository finds the whole model or none of it. What the repository has already is not sent.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd

from qtipcli.errors import QtipError, SettingsError, storage_error
from qtipcli.hub import card
from qtipcli.hub.repository import MAIN, RemoteFile, Repository
from qtipcli.job.files import sha256_file
from qtipcli.job.interrupt import checkpoint, interruptible
from qtipcli.stages import inspect, pack
from qtipcli.stages.card import CARD_FILE
from qtipcli.stages.progress import Silent, Watcher

STEP_BYTES = 1_000_000
"""Of progress: files differ too much in size to be steps themselves."""

LARGE_BYTES = 1_000_000
"""From here on a file is sent by itself. Which files are stored as large ones, the Hub decides."""


@dataclass(frozen=True)
class _LocalFile:
    """A file to be in the repository. content: where it differs from what is on disk. recorded: its sha256, as checked."""

    name: str
    path: Path
    content: bytes | None
    recorded: str | None

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.content is None else len(self.content)

    @property
    def steps(self) -> int:
        return max(1, math.ceil(self.size / STEP_BYTES))

    @cached_property
    def sha256(self) -> str:
        if self.content is not None:
            return hashlib.sha256(self.content).hexdigest()
        return self.recorded or sha256_file(self.path)

    def is_same(self, remote: RemoteFile | None) -> bool:
        if remote is None or remote.size != self.size:
            return False
        return self.sha256 == remote.sha256 if remote.sha256 is not None else self._blob() == remote.blob

    def addition(self) -> CommitOperationAdd:
        return CommitOperationAdd(self.name, self.path if self.content is None else self.content)

    def _blob(self) -> str:
        """Git's name for this content."""
        content = self.path.read_bytes() if self.content is None else self.content
        return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def run(
    directory: Path,
    name: str,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    watcher: Watcher | None = None,
    inspected: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Check the packed `directory` and make the repository `name` hold it, at the branch `revision`.

    inspected: what the inspect stage said, where it has just run. Returns {"repository", "revision", "url", "commit",
    "pull_request", "sent", "bytes", "already_there": file names}; commit is None where there was nothing to send.
    Raises what `inspect.run` and `Repository` raise; QtipError where the repository holds weights of another kind of model.
    """
    watcher = watcher or Silent()
    if create_pr and revision not in (None, MAIN):
        raise SettingsError(f"--create-pr asks to change {MAIN}, and --revision {revision} was given", "leave one of them out")
    repository = Repository.open(name, create_pr)
    report = inspected or inspect.run(directory)
    with interruptible():
        return _Push(directory, repository, revision or MAIN, create_pr, watcher).run(
            private, message or f"{report['bits_per_weight']:.3g} bits a weight, by qtip {package_version('qtipcli')}"
        )


class _Push:
    """One run of the stage."""

    def __init__(self, directory: Path, repository: Repository, revision: str, create_pr: bool, watcher: Watcher) -> None:
        self.directory, self.repository, self.revision = directory, repository, revision
        self.create_pr, self.watcher = create_pr, watcher
        self.local = local_files(directory, repository.name, None if revision == MAIN else revision)

    def run(self, private: bool, message: str) -> dict[str, Any]:
        self._check_card()
        self.repository.create(private)
        self.repository.create_branch(self.revision)
        remote = self.repository.files(self.revision)
        stale = self._stale(remote)
        new = [file for file in self.local if not file.is_same(remote.get(file.name))]
        kept = [file for file in self.local if file not in new]
        at = "" if self.revision == MAIN else f" at {self.revision}"
        report = {
            "repository": self.repository.name,
            "revision": self.revision,
            "url": self.repository.url + ("" if self.revision == MAIN else f"/tree/{self.revision}"),
            "commit": None,
            "pull_request": None,
            "sent": [file.name for file in new],
            "bytes": sum(file.size for file in new),
            "already_there": [file.name for file in kept],
        }
        self.watcher.begin(
            f"push to {self.repository.name}{at}", sum(file.steps for file in self.local), sum(file.steps for file in kept)
        )
        if not new and not stale:
            self.watcher.note(f"{self.repository.name}{at} holds all of it already: nothing was sent")
            return report
        commit = self.repository.commit(self._send(new), stale, self.revision, message, self.create_pr)
        for warning in commit.warnings:
            self.watcher.note(warning)
        return report | {"url": commit.pull_request or report["url"], "commit": commit.oid, "pull_request": commit.pull_request}

    def _send(self, files: list[_LocalFile]) -> list[CommitOperationAdd]:
        """Send what can be sent before the commit; the additions for it."""
        additions = {file.name: file.addition() for file in files}
        large = [file for file in files if file.size >= LARGE_BYTES]
        for file in large:
            checkpoint()
            self.repository.send([additions[file.name]], self.revision, self.create_pr)
            self._advance(file)
        checkpoint()
        small = [file for file in files if file not in large]
        self.repository.send([additions[file.name] for file in small], self.revision, self.create_pr)
        for file in small:
            self._advance(file)
        return list(additions.values())

    def _advance(self, file: _LocalFile) -> None:
        for _ in range(file.steps):
            self.watcher.advance(f"MB, {file.name}")

    def _check_card(self) -> None:
        file = next((file for file in self.local if file.name == CARD_FILE), None)
        if file is None:
            self.watcher.note(f"{self.directory} has no {CARD_FILE}: the repository gets no card")
            return
        text = (file.path.read_bytes() if file.content is None else file.content).decode(errors="replace")
        self.repository.check_card(text)
        if "/" not in str(_metadata(text).get("base_model", "/")):
            self.watcher.note(
                f"base_model in {CARD_FILE} is a folder's name: put the original's hub name there, and push again"
            )

    def _stale(self, remote: Mapping[str, RemoteFile]) -> list[str]:
        """Weights that this push replaces: transformers might read them in the place of the new ones.

        Those of an earlier push, or of the main branch, which keeps them. Raises QtipError where they are neither.
        """
        names = {file.name for file in self.local}
        stale = [path for path in remote if "/" not in path and pack.is_weight(Path(path)) and path not in names]
        if stale and pack.RECORD_FILE not in remote:
            main = {} if self.revision == MAIN else self.repository.files(MAIN)
            if foreign := [path for path in stale if main.get(path) != remote[path]]:
                raise QtipError(
                    f"{self.repository.name} at {self.revision} holds another model's weights: {foreign[0]}",
                    "choose another repository, or --revision NAME of a new branch",
                )
        for path in stale:
            self.watcher.note(f"{path} is another model's, and goes from {self.repository.name} at {self.revision}")
        return stale


def _metadata(text: str) -> dict[str, Any]:
    """A card's metadata. Raises QtipError where it cannot be read."""
    try:
        return card.front_matter(text)
    except ValueError as error:
        raise QtipError(f"{CARD_FILE} cannot be read: {error}", "mend the lines between --- at its head") from error


def local_files(directory: Path, repository: str, revision: str | None) -> list[_LocalFile]:
    """What the repository is to hold, weights first; the card says how to load the model from there. Raises StorageError."""
    try:
        return _local_files(directory, repository, revision)
    except OSError as error:
        raise storage_error(error, directory, "read") from error


def _local_files(directory: Path, repository: str, revision: str | None) -> list[_LocalFile]:
    recorded = (pack.read_record(directory) or {}).get("sha256", {})
    files = []
    for name, path in pack.published_files(directory).items():
        content = None
        if name == CARD_FILE:
            text = path.read_bytes().decode(errors="surrogateescape")
            changed = card.with_section(text, card.USE, card.use(repository, revision))
            content = None if changed is None else changed.encode(errors="surrogateescape")
        files.append(_LocalFile(name, path, content, recorded.get(name)))
    return sorted(files, key=lambda file: (not pack.is_weight(file.path), file.name))
