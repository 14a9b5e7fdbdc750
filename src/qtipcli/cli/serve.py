"""Owns `qtip serve`: transformers' own server in a process that knows the format."""

from __future__ import annotations

from typing import Annotated

import typer

PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Settings of the command: options that are transformers' are left to it."""


def serve(
    context: typer.Context,
    directory: Annotated[str, typer.Argument(help="A packed directory, or any causal language model.", show_default=False)],
) -> None:
    """Serve a model over HTTP as OpenAI does. Takes the options of `transformers serve`, such as --port 8000 --host 0.0.0.0."""
    from qtipcli.stages import serve

    serve.run(directory, context.args)
