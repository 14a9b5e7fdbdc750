"""Owns what `qtip push --dry-run` does: which files would be in the repository, and their bytes. Nobody is asked anything."""

from __future__ import annotations

from pathlib import Path

from qtipcli.hub.repository import MAIN
from qtipcli.stages import push
from qtipcli.stages.inspect import read_config
from qtipcli.stages.plan import Plan

NOT_ASKED = "what the repository has already is not asked: the same files are not sent again"


def of_push(directory: Path, name: str, revision: str | None = None) -> Plan:
    """The plan of push.run. Raises QtipError where `directory` is no packed model, StorageError."""
    read_config(directory)
    files = push.local_files(directory, name, None if revision in (None, MAIN) else revision)
    rows = tuple(
        {"file": file.name, "bytes": file.size, "goes": "by itself" if file.size >= push.LARGE_BYTES else "with the commit"}
        for file in files
    )
    total = {"files": len(files), "bytes": sum(file.size for file in files), "repository": name, "revision": revision or MAIN}
    return Plan("push", str(directory), (), None, {}, {}, {}, {}, (NOT_ASKED,), {"files": rows, "in all": (total,)})
