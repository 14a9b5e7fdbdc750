"""Owns the start of transformers' server: the format registered, the model's name checked, what is missing said."""

from __future__ import annotations

import typer
from transformers.utils.import_utils import is_serve_available

import qtipcli  # noqa: F401, registers the format with transformers
from qtipcli.errors import QtipError
from qtipcli.stages.load import check_name


def run(directory: str, arguments: list[str]) -> None:
    """Serve until it is stopped. arguments: options of `transformers serve`, as typed.

    Raises QtipError where the server's libraries are not installed, or there is no such model; typer's own errors for options
    that transformers does not know.
    """
    if not is_serve_available():
        raise QtipError("serving needs fastapi, uvicorn and openai, which are not installed", "pip install 'qtipcli[serve]'")
    check_name(directory)
    from transformers.cli.serve import Serve

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(Serve)
    app([directory, *arguments], prog_name="qtip serve", standalone_mode=False)
