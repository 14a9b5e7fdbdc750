"""Runs the command line: `python -m qtipcli`."""

from qtipcli.cli.main import main

main()
