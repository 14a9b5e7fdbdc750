"""Owns what the loopback server answers: one method a request of the list in loopback.py, and what is kept of each."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

if TYPE_CHECKING:
    from hub.loopback import Loopback

LFS_BYTES = 100_000
CHUNK = 65536
LICENCES = ("apache-2.0", "mit", "llama3.2", "gemma", "cc-by-4.0", "other")
MODEL_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def card_errors(content: str) -> list[str]:
    """What is wrong with a card's metadata, by the Hub's documentation of model cards (docs/hub/model-cards), in short."""
    block = re.match(r"\s*---\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", content, re.DOTALL)
    if block is None:
        return []
    try:
        fields = yaml.safe_load(block[1])
    except yaml.YAMLError as error:
        return [f"YAML: {error}"]
    if not isinstance(fields, dict):
        return ["the metadata must be a table"]
    listed = {name: value if isinstance(value, list) else [value] for name, value in fields.items()}
    rules = {
        "license": lambda value: value in LICENCES,
        "language": lambda value: isinstance(value, str) and re.fullmatch(r"[a-z]{2,3}|code|multilingual", value),
        "base_model": lambda value: isinstance(value, str) and MODEL_ID.fullmatch(value),
        "base_model_relation": lambda value: value in ("adapter", "merge", "quantized", "finetune"),
        "pipeline_tag": lambda value: value in ("text-generation", "image-text-to-text"),
        "tags": lambda value: isinstance(value, str),
    }
    texts = ("library_name", "license_name", "license_link")
    found = [
        f'"{name}" must not be {item!r}' for name, rule in rules.items() for item in listed.get(name, ()) if not rule(item)
    ]
    return found + [f'"{name}" must be a text' for name in texts if not isinstance(fields.get(name, ""), str)]


@dataclass
class Upload:
    """One PUT: of which content, the bytes that arrived, and whether that was all of it."""

    oid: str
    bytes: int
    complete: bool


@dataclass
class Commit:
    """What one commit request carried."""

    repository: str
    revision: str
    message: str
    small: dict[str, int]
    large: dict[str, str]
    deleted: list[str]


@dataclass
class Repo:
    private: bool
    branches: dict[str, str]
    trees: dict[str, dict[str, tuple[bytes, bool]]] = field(default_factory=dict)
    """Commit -> path -> (content, whether it is a large file)."""


class _RefusedError(Exception):
    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


def _blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub: Loopback
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None: ...

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        self.route, self.query = unquote(parts.path), parse_qs(parts.query)
        self.raw_route = parts.path
        self.hub.requests.append((self.command, self.route))
        with contextlib.suppress(ConnectionError):
            if (fault := self.hub.fault(self.command, self.path)) is not None:
                for _ in self._chunks():
                    pass
                self._answer(fault.status, {"error": f"fault {fault.status}"}, fault.headers)
                return
            if self.command == "PUT":
                self._put()
                return
            body = b"".join(self._chunks())
            try:
                with self.hub.lock:
                    self._dispatch(body)
            except _RefusedError as refusal:
                headers = {"X-Error-Message": refusal.message} | ({"X-Error-Code": refusal.code} if refusal.code else {})
                self._answer(refusal.status, {"error": refusal.message}, headers)

    # ---- requests and answers ----------------------------------------------------------------------------------------------

    def _chunks(self) -> Iterator[bytes]:
        """The body as it arrives; ends early where the client goes away."""
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().strip() or b"0", 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length") or 0)
        while left:
            chunk = self.rfile.read1(min(left, CHUNK))
            if not chunk:
                self.close_connection = True
                return
            left -= len(chunk)
            yield chunk

    def _answer(self, status: int, content: Any = None, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json", "Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _account(self) -> str | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        account = self.hub.accounts.get(header.removeprefix("Bearer "))
        if account is None:
            raise _RefusedError(401, "Invalid credentials in Authorization header")
        return account

    def _dispatch(self, body: bytes) -> None:
        self.account = self._account()
        for method, pattern, answer in _ROUTES:
            if (found := re.fullmatch(pattern, self.route)) and self.command in method:
                answer(self, body, *found.groups())
                return
        raise _RefusedError(404, f"the loopback server does not know {self.command} {self.route}")

    # ---- accounts and repositories -----------------------------------------------------------------------------------------

    def _whoami(self, body: bytes) -> None:
        if self.account is None:
            raise _RefusedError(401, "Invalid username or password.")
        role = "read" if self.account == "reader" else "write"
        access = {"accessToken": {"displayName": "test", "role": role}}
        self._answer(200, {"type": "user", "name": self.account, "orgs": [{"name": f"{self.account}-lab"}], "auth": access})

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        owner = asked.get("organization") or self.account
        name = f"{owner}/{asked['name']}"
        if not self._may_write(name):
            raise _RefusedError(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        if name in self.hub.repositories:
            raise _RefusedError(409, "You already created this model repo")
        private = asked.get("private", False) or asked.get("visibility") == "private"
        self.hub.repositories[name] = Repo(private, {})
        self.hub.add_commit(name, "main", {".gitattributes": (b"*.safetensors filter=lfs\n", False)})
        self._answer(200, {"url": f"{self.hub.url}/{name}", "id": "1", "name": name})

    def _may_write(self, name: str) -> bool:
        return self.account not in (None, "reader") and name.split("/")[0] in (self.account, f"{self.account}-lab")

    def _repo(self, name: str, write: bool = False) -> Repo:
        repo = self.hub.repositories.get(name)
        if repo is None or (repo.private and not self._may_write(name)):
            raise _RefusedError(401 if self.account is None else 404, "Repository not found", "RepoNotFound")
        if write and not self._may_write(name):
            raise _RefusedError(403, f"Forbidden: pass `create_pr=1` as a query parameter to write to {name}")
        return repo

    def _commit_of(self, name: str, revision: str) -> str:
        repo = self._repo(name)
        oid = repo.branches.get(revision, revision)
        if oid not in repo.trees:
            raise _RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid

    def _info(self, body: bytes, name: str, revision: str | None = None) -> None:
        oid = self._commit_of(name, revision or "main")
        files = [{"rfilename": path} for path in self.hub.repositories[name].trees[oid]]
        self._answer(200, {"id": name, "sha": oid, "private": self._repo(name).private, "siblings": files, "tags": []})

    def _tree(self, body: bytes, name: str, revision: str, folder: str | None = None) -> None:
        tree = self.hub.repositories[name].trees[self._commit_of(name, revision)] if self._repo(name) else {}
        inside = {path: file for path, file in tree.items() if folder is None or path.startswith(f"{folder}/")}
        if folder is not None and not inside:
            raise _RefusedError(404, f"{folder} does not exist", "EntryNotFound")
        self._answer(200, [_listed(path, *file) for path, file in inside.items()])

    def _refs(self, body: bytes, name: str) -> None:
        branches = self._repo(name).branches
        listed = [{"name": key, "ref": f"refs/heads/{key}", "targetCommit": oid} for key, oid in branches.items()]
        self._answer(200, {"branches": listed, "converts": [], "tags": [], "pullRequests": []})

    def _branch(self, body: bytes, name: str, branch: str) -> None:
        repo = self._repo(name, write=True)
        if branch in repo.branches:
            raise _RefusedError(409, f"Reference already exists: {branch}")
        self.hub.add_commit(name, branch, dict(repo.trees[repo.branches["main"]]))
        self._answer(200, {})

    # ---- uploads -----------------------------------------------------------------------------------------------------------

    def _preupload(self, body: bytes, name: str, revision: str) -> None:
        self._repo(name, write="create_pr" not in self.query)
        tree = self.hub.repositories[name].trees[self._commit_of(name, revision)]
        files = []
        for asked in json.loads(body)["files"]:
            is_large = asked["size"] > LFS_BYTES or asked["path"].endswith(".safetensors")
            known = tree.get(asked["path"])
            oid = None if known is None else hashlib.sha256(known[0]).hexdigest() if known[1] else _blob(known[0])
            mode = "lfs" if is_large else "regular"
            files.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._answer(200, {"files": files})

    def _batch(self, body: bytes, name: str) -> None:
        self._repo(name)
        objects: list[dict[str, Any]] = []
        for asked in json.loads(body)["objects"]:
            oid, size, part = asked["oid"], asked["size"], self.hub.part_bytes
            objects.append({"oid": oid, "size": size})
            if oid in self.hub.store:
                continue
            action: dict[str, Any] = {"href": f"{self.hub.url}/store/{oid}"}
            if part is not None and size > part:
                urls = {str(n + 1): f"{self.hub.url}/store/{oid}?part={n + 1}" for n in range(-(-size // part))}
                action = {"href": f"{self.hub.url}/store/{oid}/complete", "header": {"chunk_size": str(part), **urls}}
            objects[-1]["actions"] = {"upload": action}
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _put(self) -> None:
        oid = self.route.removeprefix("/store/")
        with self.hub.lock:
            number = len(self.hub.uploads)
            upload = Upload(oid, 0, False)
            self.hub.uploads.append(upload)
        kept = bytearray()
        stop = self.hub.hold_at(number)
        for chunk in self._chunks():
            kept += chunk
            upload.bytes = len(kept)
            if stop is not None and len(kept) >= stop:
                self.hub.held.set()
                self.hub.resume.wait(60)
                self.close_connection = True
                return
        if len(kept) != int(self.headers.get("Content-Length") or len(kept)):
            return  # the client has gone: nobody to answer, and nothing is kept
        content = bytes(kept)
        if part := self.query.get("part"):
            self.hub.parts[oid, int(part[0])] = content
        elif hashlib.sha256(content).hexdigest() == oid:
            self.hub.store[oid] = content
        else:
            self._answer(400, {"error": "content does not match its oid"})
            return
        upload.complete = True
        self._answer(200, {}, {"ETag": f'"{hashlib.md5(content).hexdigest()}"'})

    def _complete(self, body: bytes, oid: str) -> None:
        numbers = [part["partNumber"] for part in json.loads(body)["parts"]]
        content = b"".join(self.hub.parts.pop((oid, number)) for number in numbers)
        if hashlib.sha256(content).hexdigest() != oid:
            raise _RefusedError(400, "the parts do not match the oid")
        self.hub.store[oid] = content
        self._answer(200, {})

    def _commit(self, body: bytes, name: str, revision: str) -> None:
        is_pull_request = "create_pr" in self.query
        repo = self._repo(name, write=not is_pull_request)
        tree = dict(repo.trees[self._commit_of(name, revision)])
        made = Commit(name, revision, "", {}, {}, [])
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                made.message = value["summary"]
            elif item["key"] == "file":
                content = base64.b64decode(value["content"])
                tree[value["path"]] = (content, False)
                made.small[value["path"]] = len(content)
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.store:
                    raise _RefusedError(400, f"{value['path']} was not uploaded")
                tree[value["path"]] = (self.hub.store[value["oid"]], True)
                made.large[value["path"]] = value["oid"]
            else:
                made.deleted.append(value["path"])
                del tree[value["path"]]
        branch = f"refs/pr/{1 + sum(key.startswith('refs/pr/') for key in repo.branches)}" if is_pull_request else revision
        oid = self.hub.add_commit(name, branch, tree)
        self.hub.commits.append(made)
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{name}/commit/{oid}"}
        if is_pull_request:
            answer["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/{branch.removeprefix('refs/pr/')}"
        self._answer(200, answer)

    def _validate(self, body: bytes) -> None:
        content = json.loads(body)["content"]
        errors = [{"message": message} for message in card_errors(content)]
        warnings = [] if content.lstrip().startswith("---") else [{"message": "empty or missing yaml metadata in repo card"}]
        self._answer(400 if errors else 200, {"errors": errors, "warnings": warnings})

    # ---- downloads ---------------------------------------------------------------------------------------------------------

    def _resolve(self, body: bytes, name: str, revision: str, path: str) -> None:
        oid = self._commit_of(name, revision)
        file = self.hub.repositories[name].trees[oid].get(path)
        if file is None:
            raise _RefusedError(404, f"{path} does not exist", "EntryNotFound")
        content, is_large = file
        etag = hashlib.sha256(content).hexdigest() if is_large else _blob(content)
        self._answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": oid, "Content-Type": "application/octet-stream"})


def _listed(path: str, content: bytes, is_large: bool) -> dict[str, Any]:
    listed: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": _blob(content)}
    if is_large:
        listed["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return listed


_NAME = r"([^/]+/[^/]+)"
_MODEL = rf"/api/models/{_NAME}"
_REVISION = r"(refs/pr/\d+|[^/]+)"
_ROUTES = (
    (("GET",), r"/api/whoami-v2", Handler._whoami),
    (("POST",), r"/api/repos/create", Handler._create),
    (("POST",), r"/api/validate-yaml", Handler._validate),
    (("GET",), _MODEL, Handler._info),
    (("GET",), rf"{_MODEL}/revision/{_REVISION}", Handler._info),
    (("GET",), rf"{_MODEL}/tree/{_REVISION}(?:/(.+))?", Handler._tree),
    (("GET",), rf"{_MODEL}/refs", Handler._refs),
    (("POST",), rf"{_MODEL}/branch/(.+)", Handler._branch),
    (("POST",), rf"{_MODEL}/preupload/{_REVISION}", Handler._preupload),
    (("POST",), rf"{_MODEL}/commit/{_REVISION}", Handler._commit),
    (("POST",), rf"/{_NAME}\.git/info/lfs/objects/batch", Handler._batch),
    (("POST",), r"/store/([0-9a-f]+)/complete", Handler._complete),
    (("GET", "HEAD"), rf"/{_NAME}/resolve/{_REVISION}/(.+)", Handler._resolve),
)
"""Methods, path, answer. Paths are unquoted, so that a pull request's reference has its slashes."""
