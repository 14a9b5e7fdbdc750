"""The command line. `main` is the one place that turns an error into words and an exit status."""

from qtipcli.cli.main import main

__all__ = ["main"]
