"""Owns `qtip push`, and what --push-to does in the commands that make a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from qtipcli.cli import dry_run as dry_runs
from qtipcli.cli import options
from qtipcli.cli.display import Display, print_json
from qtipcli.errors import SettingsError


def push(
    directory: Annotated[Path, typer.Argument(help="A packed directory.", show_default=False)],
    repository: Annotated[
        str, typer.Argument(metavar="USER/REPO", help="On the Hugging Face Hub; made if absent.", show_default=False)
    ],
    private: Annotated[bool, typer.Option("--private", help="Where it is made: for your eyes only.")] = False,
    revision: Annotated[str | None, typer.Option(help="A branch, such as 2bit; made if absent \\[main].")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request in the place of a commit.")] = False,
    message: Annotated[str | None, typer.Option(help="Of the commit \\[the model's bits].")] = None,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
) -> None:
    """Check a packed directory and upload it to the Hub, with its card. Given again, it sends what is new or was cut off."""
    if dry_run:
        dry_runs.push(directory, repository, revision, as_json)
        return
    from qtipcli.stages import push

    with Display() as display:
        report = push.run(directory, repository, private, revision, create_pr, message, display)
    if as_json:
        print_json(report)
        return
    print(report["url"])


def check(repository: str | None, packs: bool = True) -> None:
    """Refuse a --push-to that cannot end well, before hours of work. Raises SettingsError, QtipError."""
    if repository is None:
        return
    if not packs:
        raise SettingsError("--push-to sends a packed model, and --no-pack makes none", "leave one of them out")
    from qtipcli.hub.repository import Repository

    Repository.open(repository)


def after(directory: Path, repository: str | None, inspected: Mapping[str, Any]) -> dict[str, Any]:
    """Push what was just packed and checked, where --push-to asked for it; {"pushed": where} or {}."""
    if repository is None:
        return {}
    from qtipcli.stages import push

    with Display() as display:
        return {"pushed": push.run(directory, repository, watcher=display, inspected=inspected)["url"]}
