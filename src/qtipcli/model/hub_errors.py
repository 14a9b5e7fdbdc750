"""Owns the words for what the Hub has against a model: gated, misspelt, without that revision, or out of reach."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from qtipcli.errors import QtipError, storage_error


@contextmanager
def hub_errors(name: str, revision: str | None) -> Iterator[None]:
    """Says in words what the Hub has against a model. Raises QtipError, StorageError."""
    try:
        yield
    except GatedRepoError as error:
        hint = f"accept its terms at https://huggingface.co/{name}, then log in with `hf auth login`"
        raise QtipError(f"{name} is gated and this account has no access", hint) from error
    except RevisionNotFoundError as error:
        raise QtipError(f"{name} has no revision {revision}", "see its branches and tags on the Hugging Face Hub") from error
    except RepositoryNotFoundError as error:
        hint = near_folder(Path(name)) or "check the spelling; a private model needs `hf auth login`"
        raise QtipError(f"{name} is neither a local directory nor a model on the Hugging Face Hub", hint) from error
    except HFValidationError as error:
        hint = near_folder(Path(name)) or "give a local directory, or a Hub id such as org/model"
        raise QtipError(f"{name} is neither a local directory nor a possible Hub id", hint) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, ConnectionError) as error:
        hint = near_folder(Path(name)) or "check the network, or give the path of a local copy"
        raise QtipError(
            f"{name}{at(revision)} is not in the local cache and the Hugging Face Hub cannot be reached", hint
        ) from error
    except OSError as error:
        raise storage_error(error, error.filename or "the Hugging Face cache") from error


def at(revision: str | None) -> str:
    """How a sentence names the revision that was asked for."""
    return f" at revision {revision}" if revision else ""


def near_folder(path: Path) -> str:
    """A "did you mean" for a path that does not exist, or nothing."""
    if not path.parent.is_dir():
        return ""
    folders = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    near = difflib.get_close_matches(path.name, folders, n=1)
    return f"did you mean {path.parent / near[0]}?" if near else ""
