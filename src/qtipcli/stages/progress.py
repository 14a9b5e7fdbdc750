"""Owns what a stage tells whoever is watching: where it is, one row for each layer, and notes that must not be lost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Watcher(Protocol):
    """Hears of a stage's progress. `cli.display` shows it to a person; `Silent` ignores it."""

    def begin(self, title: str, total: int, done: int = 0) -> None:
        """A phase of `total` equal steps starts, of which `done` were finished by an earlier run."""

    def advance(self, text: str = "") -> None:
        """One step is finished."""

    def row(self, values: Mapping[str, Any]) -> None:
        """One layer is finished; the keys are column names, the same in every call of a phase."""

    def note(self, text: str) -> None:
        """Something that the user must read: a fallback, a shortage, what was left out."""


class Silent:
    """The watcher of nobody."""

    def begin(self, title: str, total: int, done: int = 0) -> None:
        """Ignored."""

    def advance(self, text: str = "") -> None:
        """Ignored."""

    def row(self, values: Mapping[str, Any]) -> None:
        """Ignored."""

    def note(self, text: str) -> None:
        """Ignored."""
