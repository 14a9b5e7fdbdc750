"""Owns what a person sees: progress and notes on stderr, tables and JSON on stdout."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from qtipcli.errors import one_line
from qtipcli.stages.figures import WithError, text_of

COLUMN_WIDTHS = {"layer": 38, "shape": 14, "bits": 5, "relative proxy loss": 20, "seconds": 8}
"""Of the per-layer rows, which are printed one by one as layers finish."""


def print_json(value: Any) -> None:
    """One JSON object on stdout."""
    json.dump(value, sys.stdout, indent=2, default=str)
    sys.stdout.write("\n")


def print_table(
    title: str, rows: Sequence[Mapping[str, Any]], columns: Iterable[str] | None = None, split: int | None = None
) -> None:
    """Rows as a table on stdout; numbers to the right.

    split: where the terminal is too narrow, the columns from this one on make a second table, with the first in front.
    """
    names = list(columns or (rows[0] if rows else ()))
    # A table in a file or a pipe is not cut to a terminal's width.
    console = Console(width=None if sys.stdout.isatty() else 160, markup=False, emoji=False)
    table = _table(title, rows, names)
    # Measured in a console without end: a measurement never exceeds its console's own width.
    endless = console.options.update(max_width=sys.maxsize)
    if split is not None and Measurement.get(console, endless, table).maximum > console.width:
        console.print(_table(title, rows, names[:split]))
        table = _table("", rows, [names[0], *names[split:]])
    console.print(table)


def _table(title: str, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Table:
    table = Table(title=title or None, title_justify="left")
    for name in names:
        is_number = any(isinstance(row.get(name), int | float | WithError) for row in rows)
        table.add_column(name.replace("_", " "), justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(one_line(text_of(row.get(name))) for name in names))
    return table


PLAIN_LINE_SECONDS = 5.0
"""Off a terminal, a phase of many short steps says where it is this often; and at its end."""


class Display:
    """Shows a stage's progress on stderr: a bar with ETA on a terminal, plain lines elsewhere. A context manager."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(stderr=True, highlight=False, markup=False, emoji=False, quiet=quiet, soft_wrap=True)
        self._bar: Progress | None = None
        self._task: Any = None
        self._title = ""
        self._total = self._done = self._done_before = 0
        self._started = self._last_line = time.monotonic()
        self._has_header = False

    def __enter__(self) -> Display:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def begin(self, title: str, total: int, done: int = 0) -> None:
        """See stages.progress.Watcher."""
        self._end()
        self._title, self._total, self._done, self._done_before = title, total, done, done
        self._started = self._last_line = time.monotonic()
        self._has_header = False
        resumed = f" ({done} of {total} done before)" if done else ""
        self.console.print(f"{title}{resumed}")
        if self.console.is_terminal and not self.console.quiet:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=self.console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task(title, total=total, completed=done)

    def advance(self, text: str = "") -> None:
        """See stages.progress.Watcher."""
        self._done += 1
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)
            return
        now = time.monotonic()
        if now - self._last_line < PLAIN_LINE_SECONDS and self._done < self._total:
            return
        self._last_line = now
        elapsed = now - self._started
        left = elapsed / max(1, self._done - self._done_before) * (self._total - self._done)
        self.console.print(f"  {self._title} {self._done}/{self._total} {text}: {elapsed:.0f} s, about {left:.0f} s left")

    def row(self, values: Mapping[str, Any]) -> None:
        """See stages.progress.Watcher."""
        cells = {name: text_of(value) for name, value in values.items()}
        if not self._has_header:
            self.console.print("  " + " ".join(name.ljust(COLUMN_WIDTHS.get(name, 12)) for name in cells))
            self._has_header = True
        self.console.print("  " + " ".join(text.ljust(COLUMN_WIDTHS.get(name, 12)) for name, text in cells.items()))

    def note(self, text: str) -> None:
        """See stages.progress.Watcher."""
        self.console.print(f"note: {text}")

    def _end(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
