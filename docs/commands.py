"""Owns docs/commands/: a page for each command with what its --help prints; `make docs` writes them, a test compares."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typer.main import get_command
from typer.testing import CliRunner

from qtipcli.cli.app import app

FOLDER = Path(__file__).with_name("commands")

PLAIN = {"TERM": "dumb", "NO_COLOR": "1", "COLUMNS": "110"}


def pages() -> dict[str, str]:
    """File name -> text: one for each command, and an index."""
    found: dict[str, str] = {}
    rows = []
    for words, command in _commands(get_command(app)):
        name = f"{'-'.join(words)}.md"
        title = f"qtip {' '.join(words)}"
        printed = CliRunner().invoke(app, [*words, "--help"], env=PLAIN, prog_name="qtip").output
        lines = [line.rstrip() for line in printed.strip().splitlines()]
        found[name] = "\n".join([f"# {title}", "```", *lines, "```", ""])
        rows.append(f"| [{title}]({name}) | {' '.join(command.help.split())} |")
    return found | {"README.md": "\n".join(["# Commands", "", "Made by `make docs`.", "", "| | |", "|---|---|", *rows, ""])}


def _commands(group: Any, before: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, (*before, name))
        else:
            yield (*before, name), command


def main() -> None:
    """Write the pages, and take away those of commands that are gone."""
    FOLDER.mkdir(exist_ok=True)
    wanted = pages()
    for file in FOLDER.glob("*.md"):
        if file.name not in wanted:
            file.unlink()
    for name, text in wanted.items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
