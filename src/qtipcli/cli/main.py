"""Owns the process: what a failure prints, which status it exits with, and which libraries are kept quiet."""

from __future__ import annotations

import os
import sys

import typer

from qtipcli.errors import PeerError, QtipError, storage_error
from qtipcli.job import launcher
from qtipcli.job.interrupt import stopped_at_once

# Newer Typers carry a Click of their own; its base class of usage errors is reached through the one that Typer exports.
UsageFailure = typer.BadParameter.__mro__[2]


def main(arguments: list[str] | None = None) -> None:
    """Run one command and exit: 0 done, 1 failed, 2 bad usage, 130 interrupted.

    A bug still ends in its traceback: hiding it would help nobody. Everything a user can cause is a QtipError.
    """
    sys.exit(_run(sys.argv[1:] if arguments is None else arguments))


def _run(arguments: list[str]) -> int:
    try:
        _prepare_environment()
        from qtipcli.cli.app import app

        return app(arguments, prog_name="qtip", standalone_mode=False) or 0
    except PeerError as error:
        return error.exit_code
    except QtipError as error:
        return _complain(error)
    except typer.Exit as end:
        return end.exit_code
    except UsageFailure as error:
        launcher.let_first_speak()
        error.show()
        return error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        return _complain(stopped_at_once())
    except BrokenPipeError:
        # The reader of our output went away, as `| head` does. Nothing can be said to it any more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.filename is None:
            raise
        return _complain(storage_error(error, error.filename))


def _complain(error: QtipError) -> int:
    launcher.let_first_speak()
    print(f"qtip: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"  hint: {error.hint}", file=sys.stderr)
    return error.exit_code


def _prepare_environment() -> None:
    """Set what torch and transformers read when they are imported, unless the user has set it."""
    # After each of its parallel regions torch's OpenMP spins for milliseconds, on cores that our own threads then lack; and
    # where other processes hold a core, it spins out its time slice. Sleeping costs torch about 15 % on an idle one.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Their bars and advice would stand between the lines of our own; errors still come through.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # some of its bars ask for themselves whether to be shown
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
