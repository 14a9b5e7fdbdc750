"""Directories that somebody broke on purpose, and what qtip makes of them: docs/format.md, "Hostile input"."""
