"""Owns the conversation with the Hub about one model repository: who asks, what is there, what is sent, and every refusal.

Only this file calls huggingface_hub to write. Each failure becomes one QtipError; what may pass (5xx, a broken connection) is
tried again a bounded number of times, where huggingface_hub does not do that itself. The token is in no message.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_session,
    get_token,
)
from huggingface_hub.errors import (
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import hf_raise_for_status, validate_repo_id

from qtipcli.errors import QtipError

WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before each further try, as huggingface_hub waits for its own, and one try more."""

LONGEST_WAIT = 60.0
"""Seconds that the Hub may ask us to wait (Retry-After) before we give up instead."""

PASSING = (408, 429, 500, 502, 503, 504)
"""HTTP statuses that another try may not meet; huggingface_hub's own list."""

MAIN = "main"
_PULL_REQUEST = "refs/pr/"
_TOKENS = "https://huggingface.co/settings/tokens"
_AGAIN = "give the same command again later: what the Hub has is not sent twice"
_MEND = "mend what it objects to, then give the same command again"

Result = TypeVar("Result")


@dataclass(frozen=True)
class RemoteFile:
    """A file of the repository: its size, and the sha256 of a large one or the git blob id of a small one."""

    size: int
    sha256: str | None
    blob: str


@dataclass(frozen=True)
class Commit:
    """What was made: url to look at, oid of the commit, pull_request: its url or None; warnings of the Hub about the card."""

    url: str
    oid: str
    pull_request: str | None
    warnings: tuple[str, ...]


class Repository:
    """A model repository that this account may write to, as far as is known before anything is written. Make one with `open`.

    Attributes: name: OWNER/REPO; account: whose token it is; url: its page.
    """

    def __init__(self, name: str, account: str, api: HfApi, waits: tuple[float, ...]) -> None:
        self.name, self.account = name, account
        self._api, self._waits = api, waits

    @classmethod
    def open(cls, name: str, create_pr: bool = False, waits: tuple[float, ...] | None = None) -> Repository:
        """Check the name, and ask the Hub whose token this is. Nothing is written.

        create_pr: a pull request may go to a repository of others. waits: seconds before each further try.
        Raises QtipError: the name is malformed, there is no token, the Hub refuses it or it can only read, the owner is
        another account, the Hub cannot be reached.
        """
        _check_name(name)
        if (token := get_token()) is None:
            raise QtipError(f"no token of the Hugging Face Hub was found, and {name} is to be written", _login_hint())
        api = HfApi(token=token, library_name="qtip")
        repository = cls(name, "", api, WAITS if waits is None else waits)
        found = repository._ask("whoami", api.whoami)
        account, access = found.get("name", ""), found.get("auth", {}).get("accessToken", {})
        repository.account = account
        if access.get("role") == "read":
            raise QtipError(f"the token of {account} can only read, and {name} is to be written", _write_token_hint())
        owner = name.split("/")[0]
        owners = [account, *(organization.get("name") for organization in found.get("orgs", ()))]
        # A classic token lists all organizations of its account; a fine-grained one need not.
        if access.get("role") == "write" and owner not in owners and not create_pr:
            hint = f"push to {account}/{name.split('/')[1]}, or use a token of {owner}, or --create-pr for a pull request"
            raise QtipError(f"the token is of {account}, which is not {owner} and not a member of it", hint)
        return repository

    @property
    def url(self) -> str:
        return f"{self._api.endpoint}/{self.name}"

    def create(self, private: bool) -> None:
        """Make the repository unless it is there. Raises QtipError where it is public and was to be private."""
        try:
            info = self._ask("model info", lambda: self._api.model_info(self.name), passing=(RepositoryNotFoundError,))
        except RepositoryNotFoundError:
            visibility = {"private": True} if private else {}  # else as the account's own default has it
            self._ask("create", lambda: self._api.create_repo(self.name, exist_ok=True, **visibility))
            return
        if private and not info.private:
            hint = "make it private in its settings on the Hub, choose another name, or leave out --private"
            raise QtipError(f"{self.name} is there already, and it is public", hint)

    def create_branch(self, revision: str) -> None:
        """Make the branch from the main one unless it is there. A pull request's reference is taken to be."""
        if revision != MAIN and not revision.startswith(_PULL_REQUEST):
            self._ask("branch", lambda: self._api.create_branch(self.name, branch=revision, exist_ok=True))

    def files(self, revision: str) -> dict[str, RemoteFile]:
        """Path -> file, of all at that branch."""

        def listed() -> dict[str, RemoteFile]:
            tree = self._api.list_repo_tree(self.name, recursive=True, revision=revision)
            return {
                file.path: RemoteFile(file.size, file.lfs.sha256 if file.lfs else None, file.blob_id)
                for file in tree
                if isinstance(file, RepoFile)
            }

        return self._ask("list", listed)

    def check_card(self, text: str) -> None:
        """Let the Hub look at a card before anything is sent. Raises QtipError where it refuses its metadata."""
        self._ask("card", lambda: self._validate(text))

    def _validate(self, text: str) -> None:
        # As ModelCard.validate does it, which in huggingface_hub 1 asks huggingface.co whatever HF_ENDPOINT says.
        body = {"repoType": "model", "content": text}
        answer = get_session().post(f"{self._api.endpoint}/api/validate-yaml", json=body, headers={"Accept": "text/plain"})
        if answer.status_code == 400:
            raise ValueError(answer.text)
        hf_raise_for_status(answer)

    def send(self, additions: list[CommitOperationAdd], revision: str, create_pr: bool) -> None:
        """Send the content of those that the Hub stores as large files; the others wait for the commit.

        What the Hub has already is not sent. huggingface_hub itself tries each request again.
        """
        if additions:
            self._ask(
                "upload",
                lambda: self._api.preupload_lfs_files(self.name, additions, revision=revision, create_pr=create_pr),
                tries_again=False,
            )

    def commit(
        self, additions: Iterable[CommitOperationAdd], deletions: Iterable[str], revision: str, message: str, create_pr: bool
    ) -> Commit:
        """Make all of it one commit, or one pull request."""
        operations = [*additions, *(CommitOperationDelete(path) for path in deletions)]

        def committed() -> Any:
            return self._api.create_commit(
                self.name, operations, commit_message=message, revision=revision, create_pr=create_pr
            )

        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always", UserWarning)
            # A pull request whose answer was lost would be opened twice; a commit that is there already changes nothing.
            info = self._ask("commit", committed, tries_again=not create_pr)
        said = tuple(" ".join(str(warning.message).split()) for warning in heard if issubclass(warning.category, UserWarning))
        return Commit(info.commit_url, info.oid, info.pr_url, said)

    def _ask(
        self,
        what: str,
        call: Callable[[], Result],
        tries_again: bool = True,
        passing: tuple[type[Exception], ...] = (),
    ) -> Result:
        """The answer of `call`. passing: errors that are the caller's. Raises QtipError for every other one of the Hub's."""
        waits = self._waits if tries_again else ()
        for tried, wait in enumerate((*waits, None), start=1):
            try:
                return call()
            except passing:
                raise
            except Exception as error:  # the HTTP client's errors are of another package with each version of huggingface_hub
                cause = _cause(error)
                if wait is None or not _may_pass(cause, patient=what != "whoami"):
                    if (explained := self._explained(cause, what, tried)) is None:
                        raise
                    raise explained from error
                time.sleep(max(wait, _asked_wait(cause)))
        raise AssertionError("the last try returns or raises")

    def _explained(self, error: Exception, what: str, tried: int) -> QtipError | None:
        """The QtipError that says what happened; None where `error` is not the Hub's or the network's."""
        status = _status(error)
        said = self._without_token(_said(error))
        tries = f" ({tried} tries)" if tried > 1 else ""
        endpoint = self._api.endpoint
        if isinstance(error, OfflineModeIsEnabled):
            return QtipError(f"{self.name} cannot be reached: offline mode is on", "unset HF_HUB_OFFLINE")
        if what == "whoami" and status == 401:
            return QtipError(f"the Hugging Face Hub does not accept the token: {said}", _login_hint())
        if isinstance(error, RevisionNotFoundError):
            return QtipError(f"{self.name} has no such revision", "leave out --revision, or name a branch, which is then made")
        if status == 403:
            return QtipError(f"{self.account or 'this account'} may not write to {self.name}: {said}", _write_token_hint())
        if isinstance(error, RepositoryNotFoundError) or status in (401, 404):
            hint = "check the name, and that the token may see and write it"
            return QtipError(f"{self.name} is not on the Hub, or this token may not see it", hint)
        if status in PASSING:
            return QtipError(f"{endpoint} answers with status {status} to {what} of {self.name}{tries}: {said}", _AGAIN)
        if status is not None:
            return QtipError(f"{endpoint} refuses {what} of {self.name} with status {status}: {said}", _MEND)
        if _is_network(error):
            hint = f"check the network and HF_ENDPOINT, then {_AGAIN}"
            return QtipError(f"{endpoint} cannot be reached{tries}: {said or type(error).__name__}", hint)
        if isinstance(error, ValueError) and what in ("card", "commit"):
            return QtipError(f"the Hub does not accept the card: {said}", "mend the lines between --- at the head of README.md")
        return None

    def _without_token(self, text: str) -> str:
        token = self._api.token
        return text.replace(token, "[token]") if isinstance(token, str) and token else text


def _check_name(name: str) -> None:
    hint = "say OWNER/REPO, as in --push-to or `qtip push DIR someone/my-model-2bit`: letters, digits, - _ . only"
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise QtipError(f"{name!r} is no name of a repository: {error}", hint) from error
    if name.count("/") != 1:
        raise QtipError(f"{name!r} does not say whose repository it is", hint)


def _login_hint() -> str:
    return f"run `hf auth login`, or set HF_TOKEN to one of {_TOKENS}"


def _write_token_hint() -> str:
    return f"use a token with write access to it ({_TOKENS}): run `hf auth login`, or set HF_TOKEN"


def _cause(error: Exception) -> Exception:
    """What is behind an error: huggingface_hub wraps that of an upload into a RuntimeError that names the file only."""
    while isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_network(error: Exception) -> bool:
    return isinstance(error, ConnectionError) or type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "requests")


def _may_pass(error: Exception, patient: bool) -> bool:
    """Whether another try makes sense. patient: a connection that fails may do so for a moment only."""
    if isinstance(error, OfflineModeIsEnabled) or _asked_wait(error) > LONGEST_WAIT:
        return False
    status = _status(error)
    return status in PASSING if status is not None else patient and _is_network(error)


def _asked_wait(error: Exception) -> float:
    """Seconds that the Hub asks us to wait, 0 where it says nothing."""
    asked = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", "")
    return float(asked) if asked.isdecimal() else 0.0


def _said(error: Exception) -> str:
    """What the Hub, or the HTTP client, says, on one line."""
    text = getattr(error, "server_message", None) or str(error)
    return " ".join(text.split("\n\n")[0].split()).rstrip(".")
