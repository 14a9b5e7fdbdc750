"""Fixtures of the run directory's tests."""

from __future__ import annotations

import os

import pytest


@pytest.fixture
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """fsync does nothing: for tests that write hundreds of files to see what a kill leaves, which the kernel keeps anyway.

    That fsync is called, and in the right order, is a test of its own (a power cut cannot be tried here).
    """
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
