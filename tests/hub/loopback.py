"""A small stand-in for the Hugging Face Hub on 127.0.0.1, for tests: what it speaks is what huggingface_hub 1 and 2 ask.

    with Loopback() as hub:                       # in this process, on threads of its own
        ... run clients with the environment hub.environment(home, token="...") ...

The client must run in a process of its own: huggingface_hub reads HF_ENDPOINT and HF_HUB_DISABLE_XET when it is imported.

    GET  /api/whoami-v2                           401 for an unknown token
    POST /api/repos/create                        409 where it exists, 403 in another's name
    GET  /api/models/NAME[/revision/REV]          404 RepoNotFound / RevisionNotFound, also for others' private repositories
    GET  /api/models/NAME/tree/REV[/FOLDER]       every file below, on one page
    GET  /api/models/NAME/refs
    POST /api/models/NAME/branch/BRANCH           409 where it exists
    POST /api/models/NAME/preupload/REV           large files and *.safetensors are "lfs", the others "regular"
    POST /NAME.git/info/lfs/objects/batch         no actions for what is stored; multipart where `part_bytes` is set
    PUT  /store/OID[?part=N]                      checked against its sha256; what was cut off is forgotten
    POST /store/OID/complete                      of the parts
    POST /api/models/NAME/commit/REV[?create_pr=1]
    POST /api/validate-yaml                       400 for what `card_errors` finds
    HEAD, GET /NAME/resolve/REV/PATH              with the headers that downloads need

Its own ways to misbehave: `fail` answers chosen requests with a status, `hold` stops in the middle of an upload, so that a
client can be killed there. What it saw is in `requests`, `uploads` and `commits`. Tokens in `accounts` are accounts' names.
"""

from __future__ import annotations

import hashlib
import re
import threading
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from pathlib import Path

from hub.loopback_handler import Commit, Handler, Repo, Upload, card_errors

__all__ = ["Commit", "Loopback", "Repo", "Upload", "card_errors"]


@dataclass
class _Fault:
    method: str
    path: re.Pattern[str]
    status: int
    times: int | None
    headers: dict[str, str]


class Loopback:
    """The server and what it holds. Attributes may be read at any time, and set between requests."""

    def __init__(self) -> None:
        self.accounts = {"hf_writer_token": "writer", "hf_reader_token": "reader", "hf_other_token": "other"}
        self.part_bytes: int | None = None
        self.url = ""
        self.clear()

    def clear(self) -> None:
        """Forget all repositories, faults and what was seen."""
        self.repositories: dict[str, Repo] = {}
        self.store: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.uploads: list[Upload] = []
        self.commits: list[Commit] = []
        self.requests: list[tuple[str, str]] = []
        self.part_bytes = None
        self._faults: list[_Fault] = []
        self._hold: tuple[int, int] | None = None
        self.held, self.resume = threading.Event(), threading.Event()
        self.lock = threading.RLock()

    def __enter__(self) -> Loopback:
        handler = type("Handler", (Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.resume.set()
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """For a client: this server in the place of the Hub, the legacy transport, and a home without a token."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def fail(self, method: str, path: str, status: int, times: int | None = None, **headers: str) -> None:
        """Answer the next `times` requests (None: all) of this method whose path holds the pattern with `status`."""
        self._faults.append(_Fault(method, re.compile(path), status, times, headers))

    def hold(self, after_bytes: int, upload: int = 0) -> None:
        """Stop a PUT after so many bytes: set `held`, wait for `resume`, forget it. upload: of the next ones, from 0."""
        self.held.clear()
        self.resume.clear()
        self._hold = (len(self.uploads) + upload, after_bytes)

    def tree(self, name: str, revision: str = "main") -> dict[str, tuple[bytes, bool]]:
        """Path -> (content, is large) at a branch or commit."""
        repo = self.repositories[name]
        return repo.trees[repo.branches.get(revision, revision)]

    def fault(self, method: str, path: str) -> _Fault | None:
        with self.lock:
            for fault in self._faults:
                if fault.method == method and fault.path.search(path) and fault.times != 0:
                    fault.times = None if fault.times is None else fault.times - 1
                    return fault
        return None

    def hold_at(self, upload: int) -> int | None:
        return self._hold[1] if self._hold is not None and self._hold[0] == upload else None

    def add_commit(self, name: str, branch: str, tree: dict[str, tuple[bytes, bool]]) -> str:
        repo = self.repositories[name]
        oid = hashlib.sha1(f"{name} {branch} {len(repo.trees)}".encode()).hexdigest()
        repo.trees[oid] = tree
        repo.branches[branch] = oid
        return oid
