"""Owns the record of what a process does to a directory: every write, sync, rename, deletion, in order.

The functions of `os` that change a disk are wrapped. A file that is written some other way (shutil.copyfile, a builtin open)
announces itself to an audit hook: what it holds by the next operation is then taken as written, and not synced. That nothing
was missed is checked in the end: what the record makes of the disk must be what is there.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults.disk_model import Op

_WRITING = os.O_WRONLY | os.O_RDWR


class Recorder:
    """Records in this process from `install` on. root: the directory; save: where `write` puts the record."""

    def __init__(self, root: Path, save: Path) -> None:
        self.root, self.save = os.fspath(root.resolve()), save
        self.ops: list[Op] = []
        self._foreign: set[tuple[str, ...]] = set()
        self._own = False

    def install(self) -> None:
        for name in ("open", "write", "pwrite", "ftruncate", "fsync", "fdatasync", "rename", "replace", "unlink", "remove"):
            self._wrap(name)
        for name in ("mkdir", "rmdir"):
            self._wrap(name)
        sys.addaudithook(self._heard)
        self._watch_commits()

    def write(self) -> None:
        """Save the record; the command has ended well."""
        self._settle()
        self.ops.append(("ended", ()))
        self.save.write_bytes(pickle.dumps(self.ops))

    def _wrap(self, name: str) -> None:
        original = getattr(os, name)
        note = getattr(self, f"_on_{name}", None) or getattr(self, {"replace": "_on_rename", "remove": "_on_unlink",
                                                                    "fdatasync": "_on_fsync"}[name])  # fmt: skip

        def call(*arguments: Any, **options: Any) -> Any:
            self._settle()
            self._own = True
            try:
                return note(original, *arguments, **options)
            finally:
                self._own = False

        setattr(os, name, call)

    # ---- the wrapped calls: each does the original, then notes what it did ---------------------------------------------------

    def _on_open(self, original: Callable[..., int], path: Any, flags: int, mode: int = 0o777, *, dir_fd: Any = None) -> int:
        place = self._place(path, dir_fd)
        is_new = place is not None and flags & os.O_CREAT and not os.path.lexists(path)
        descriptor = original(path, flags, mode, dir_fd=dir_fd)
        if is_new:
            self.ops.append(("create", place))
        elif place is not None and flags & os.O_TRUNC:
            self.ops.append(("cut", place, 0))
        return descriptor

    def _on_write(self, original: Callable[..., int], descriptor: int, data: Any) -> int:
        place = self._of(descriptor)
        offset = os.lseek(descriptor, 0, os.SEEK_CUR) if place is not None else 0
        count = original(descriptor, data)
        if place is not None:
            self.ops.append(("write", place, offset, bytes(memoryview(data)[:count])))
        return count

    def _on_pwrite(self, original: Callable[..., int], descriptor: int, data: Any, offset: int) -> int:
        count = original(descriptor, data, offset)
        if (place := self._of(descriptor)) is not None:
            self.ops.append(("write", place, offset, bytes(memoryview(data)[:count])))
        return count

    def _on_ftruncate(self, original: Callable[..., None], descriptor: int, length: int) -> None:
        original(descriptor, length)
        if (place := self._of(descriptor)) is not None:
            self.ops.append(("cut", place, length))

    def _on_fsync(self, original: Callable[..., None], descriptor: int) -> None:
        original(descriptor)
        if (place := self._of(descriptor)) is not None:
            self.ops.append(("sync", place))

    def _on_rename(self, original: Callable[..., None], old: Any, new: Any, **where: Any) -> None:
        places = self._place(old, where.get("src_dir_fd")), self._place(new, where.get("dst_dir_fd"))
        original(old, new, **where)
        if places[0] is not None:
            self.ops.append(("rename", *places))

    def _on_unlink(self, original: Callable[..., None], path: Any, *, dir_fd: Any = None) -> None:
        self._on_removal("unlink", original, path, dir_fd)

    def _on_rmdir(self, original: Callable[..., None], path: Any, *, dir_fd: Any = None) -> None:
        self._on_removal("rmdir", original, path, dir_fd)

    def _on_removal(self, kind: str, original: Callable[..., None], path: Any, dir_fd: Any) -> None:
        place = self._place(path, dir_fd)
        original(path, dir_fd=dir_fd)
        if place is not None:
            self.ops.append((kind, place))

    def _on_mkdir(self, original: Callable[..., None], path: Any, mode: int = 0o777, *, dir_fd: Any = None) -> None:
        original(path, mode, dir_fd=dir_fd)
        if (place := self._place(path, dir_fd)) is not None:
            self.ops.append(("mkdir", place))

    # ---- what others write ---------------------------------------------------------------------------------------------------

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" or self._own or not isinstance(arguments[0], str | bytes | os.PathLike):
            return
        path, _, flags = arguments
        if flags & _WRITING and (place := self._place(path, None)) is not None:
            self._settle()
            if not os.path.lexists(path):
                self.ops.append(("create", place))
            self._foreign.add(place)

    def _settle(self) -> None:
        if self._own or not self._foreign:
            return
        for place in sorted(self._foreign):
            file = Path(self.root, *place)
            if file.is_file():
                self._own = True
                content = file.read_bytes()
                self._own = False
                self.ops += [("cut", place, 0), ("write", place, 0, content)]
        self._foreign.clear()

    # ---- small things --------------------------------------------------------------------------------------------------------

    def _watch_commits(self) -> None:
        """Note what the product says is done, when it says so."""
        from qtipcli.job.directory import RunDirectory

        commit, forget = RunDirectory.commit, RunDirectory.forget

        def committing(job: Any, key: str, *arguments: Any, **options: Any) -> None:
            commit(job, key, *arguments, **options)
            self.ops.append(("done", self._place(job.path, None), key))

        def forgetting(job: Any, *keys: str) -> None:
            for key in keys:
                self.ops.append(("forgotten", self._place(job.path, None), key))
            forget(job, *keys)

        RunDirectory.commit, RunDirectory.forget = committing, forgetting

    def _of(self, descriptor: int) -> tuple[str, ...] | None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")  # noqa: PTH115
        return None if path.endswith(" (deleted)") else self._place(path, None)

    def _place(self, path: Any, dir_fd: Any) -> tuple[str, ...] | None:
        """Names below the root; None for what lies elsewhere."""
        if isinstance(path, int):
            return self._of(path)
        path = os.fsdecode(path)
        if dir_fd is not None:
            path = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), path)  # noqa: PTH115, PTH118
        path = os.path.normpath(os.path.join(os.getcwd(), path))  # noqa: PTH109, PTH118
        if path == self.root:
            return ()
        return tuple(path[len(self.root) + 1 :].split("/")) if path.startswith(self.root + "/") else None
