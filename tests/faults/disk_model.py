"""Owns a disk that loses power: what was done to it, operation by operation, and what may be left of that afterwards.

An operation is durable only once the file (its bytes) or the directory (its names) was synced after it; of the others any may
be lost. That is less than file systems promise, and what POSIX does: nothing about order is taken for granted.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

Op = tuple[Any, ...]
"""("mkdir", path) | ("create", path) | ("write", path, offset, bytes) | ("cut", path, length) | ("sync", path) |
("rename", old, new) | ("unlink", path) | ("rmdir", path) | anything else, which does nothing to the disk. Paths are tuples of
names below the root; a "write", "cut" or "sync" names the file as it is called at that moment."""

Tree = dict[tuple[str, ...], bytes | None]
"""Path -> content; None for a directory."""

NAMES = ("none", "all", "some", "first")
BYTES = ("lost", "kept", "zeros", "torn")
"""What happens to names and bytes that were not synced."""


class _File:
    def __init__(self) -> None:
        self.now = b""
        self.synced = b""

    def write(self, offset: int, data: bytes) -> None:
        now = self.now.ljust(offset, b"\0")
        self.now = now[:offset] + data + now[offset + len(data) :]

    def left(self, how: str, dice: random.Random) -> bytes:
        if self.now == self.synced or how == "kept":
            return self.now
        if how == "lost":
            return self.synced
        kept = self.synced[: len(self.now)]
        if how == "zeros":
            return kept.ljust(len(self.now), b"\0")
        return kept + self.now[len(kept) : dice.randint(len(kept), len(self.now))]


class _Directory:
    def __init__(self) -> None:
        self.now: dict[str, _File | _Directory] = {}
        self.synced: dict[str, _File | _Directory] = {}
        self.pending: list[tuple[str | None, str | None, Any]] = []  # (name that goes, name that comes, what it is)

    def change(self, gone: str | None, new: str | None, what: _File | _Directory | None) -> None:
        self.pending.append((gone, new, what))
        _apply(self.now, self.pending[-1])

    def sync(self) -> None:
        self.synced, self.pending = dict(self.now), []

    def left(self, how: str, dice: random.Random) -> dict[str, _File | _Directory]:
        names = dict(self.synced)
        most = {"none": 0, "first": dice.randint(0, len(self.pending))}.get(how, len(self.pending))
        for change in self.pending[:most]:
            if how != "some" or dice.random() < 0.5:
                _apply(names, change)
        return names


def _apply(names: dict[str, Any], change: tuple[str | None, str | None, Any]) -> None:
    gone, new, what = change
    if gone is not None:
        names.pop(gone, None)
    if new is not None:
        names[new] = what


class Disk:
    """A directory's file system from the moment of `start` on, all of which is durable."""

    def __init__(self, start: Mapping[tuple[str, ...], bytes | None]) -> None:
        self._root = _Directory()
        for path, content in sorted(start.items()):
            if content is None:
                self.do(("mkdir", path))
            else:
                self.do(("create", path))
                self.do(("write", path, 0, content))
                self.do(("sync", path))
        for path in [(), *(path for path, content in start.items() if content is None)]:
            self.do(("sync", path))

    def do(self, op: Op) -> None:
        """Take one operation."""
        kind, path = op[0], op[1]
        if kind in ("mkdir", "create"):
            self._at(path[:-1]).change(None, path[-1], _Directory() if kind == "mkdir" else _File())
        elif kind == "write":
            self._at(path).write(*op[2:])
        elif kind == "cut":
            file = self._at(path)
            file.now = file.now[: op[2]].ljust(op[2], b"\0")
        elif kind == "sync":
            node = self._at(path)
            if isinstance(node, _File):
                node.synced = node.now
            else:
                node.sync()
        elif kind == "rename":
            if op[2][:-1] != path[:-1]:
                raise ValueError(f"a rename from one directory to another: {op}")
            self._at(path[:-1]).change(path[-1], op[2][-1], self._at(path))
        elif kind in ("unlink", "rmdir"):
            self._at(path[:-1]).change(path[-1], None, None)

    def has(self, path: tuple[str, ...]) -> bool:
        """Whether this path is there, to a process that sees all."""
        try:
            self._at(path)
        except (KeyError, AttributeError):
            return False
        return True

    def left(self, names: str, content: str, dice: random.Random) -> Tree:
        """What is there after the power went. names: one of NAMES; content: one of BYTES."""
        tree: Tree = {}

        def walk(directory: _Directory, path: tuple[str, ...]) -> None:
            for name, node in directory.left(names, dice).items():
                if isinstance(node, _File):
                    tree[*path, name] = node.left(content, dice)
                else:
                    tree[*path, name] = None
                    walk(node, (*path, name))

        walk(self._root, ())
        return tree

    def _at(self, path: tuple[str, ...]) -> Any:
        node: Any = self._root
        for name in path:
            node = node.now[name]
        return node
