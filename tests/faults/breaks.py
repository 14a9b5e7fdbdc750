"""Owns ways to break the product on purpose, to see the harness find each."""

from __future__ import annotations

from collections.abc import Callable

BREAKS: dict[str, Callable[[], None]] = {"nothing": lambda: None}
