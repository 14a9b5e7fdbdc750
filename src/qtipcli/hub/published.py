"""Owns what may leave this machine: file names and hub names, never where a user's files lie."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

_LOCAL_PATH = re.compile(r"(/|\.{1,2}/|~|file:)")
"""How a text begins that is a path and nothing else; a hub name begins with a letter or digit."""

_CACHED = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>.+)")
"""How huggingface_hub names a model's folder in its cache: models--OWNER--NAME."""


def published(value: Any) -> Any:
    """A JSON value with every local path in it replaced by the file's own name. Anything else is as it was."""
    if isinstance(value, dict):
        return {name: published(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [published(item) for item in value]
    if isinstance(value, str) and _LOCAL_PATH.match(value):
        return PurePosixPath(value).name or "local"
    return value


def model_name(directory: Path) -> str:
    """What a model in a local directory is called: its hub name where it lies in the Hub's cache, else the folder's name."""
    path = directory.expanduser().absolute()
    for part in path.parts:
        if cached := _CACHED.fullmatch(part):
            return f"{cached['owner']}/{cached['name']}"
    return path.name or "model"
