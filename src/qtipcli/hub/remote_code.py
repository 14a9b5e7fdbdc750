"""Owns the optional file in a packed directory that imports qtipcli: with it, `trust_remote_code=True` is all it takes to load.

The file re-exports transformers' own AutoConfig and no model class: a model class of its own would make save_pretrained copy
code, and tools that ask for the architecture would not know it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qtipcli.errors import QtipError
from qtipcli.untrusted import read_table

MODULE, CLASS = "configuration_qtip", "QtipAutoConfig"
REFERENCE = f"{MODULE}.{CLASS}"

SOURCE = f'''"""For trust_remote_code=True: registers the qtip format. Needs `pip install qtipcli`; it is no model code."""

from qtipcli import registration  # noqa: F401, importing qtipcli registers the format
from transformers import AutoConfig


class {CLASS}:
    """transformers' own configuration of this model."""

    @classmethod
    def from_pretrained(cls, name, **options):
        return AutoConfig.from_pretrained(name, **{{**options, "trust_remote_code": False}})

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoConfig"):
        """Nothing: this file is not to be copied by save_pretrained."""
'''


def add(directory: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Write the file into `directory`, and return `config`, the model's config.json, with the entry that names it.

    Raises QtipError where the model brings code of its own for its configuration.
    """
    others = {name: target for name, target in _entries(config.get("auto_map")).items() if target != REFERENCE}
    if "AutoConfig" in others:
        raise QtipError(
            f"the model brings its own code for its configuration: {others['AutoConfig']}",
            "leave out --remote-code, and write `import qtipcli` where the model is loaded",
        )
    (directory / f"{MODULE}.py").write_text(SOURCE, encoding="utf-8")
    return {**config, "auto_map": {**others, "AutoConfig": REFERENCE}}


def is_in(directory: Path) -> bool:
    """Whether a packed directory has the file and its entry."""
    config = read_table(directory / "config.json", "pack the model again")
    return (directory / f"{MODULE}.py").is_file() and _entries(config.get("auto_map")).get("AutoConfig") == REFERENCE


def forget(config: Any) -> None:
    """Drop the entry from a loaded model's config: what save_pretrained writes has the file no longer."""
    others = {name: target for name, target in _entries(getattr(config, "auto_map", None)).items() if target != REFERENCE}
    if others:
        config.auto_map = others
    elif hasattr(config, "auto_map"):
        del config.auto_map


def _entries(auto_map: Any) -> dict[str, Any]:
    """The table of classes in a config; empty where it is none."""
    return auto_map if isinstance(auto_map, dict) else {}
