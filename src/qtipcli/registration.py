"""Owns how transformers learns of the format: two entries in its registries, made as soon as these exist.

transformers has no entry points, so `import qtipcli` is what a user writes. The command line imports the same package and must
start fast, so nothing here imports torch or transformers: a meta-path finder waits for transformers' registry, and the entries
load the real classes when the first packed model is loaded.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from importlib.machinery import ModuleSpec
from types import ModuleType

METHOD = "qtip"
REGISTRY = "transformers.quantizers.auto"

ENTRIES = {
    "AUTO_QUANTIZATION_CONFIG_MAPPING": ("qtipcli.hub.config", "QtipConfig"),
    "AUTO_QUANTIZER_MAPPING": ("qtipcli.hub.quantizer", "QtipHfQuantizer"),
}
"""Registry in REGISTRY -> module and class. By name, not by an import statement, which would load torch."""


class DeferredClass:
    """Stands for a class that is imported when it is first called or asked for an attribute.

    Importing it at once, in the middle of transformers' own import, deadlocks with a thread that imports it by itself.
    """

    __slots__ = ("_module", "_name")

    def __init__(self, module: str, name: str) -> None:
        self._module, self._name = module, name

    def __call__(self, *arguments: object, **options: object) -> object:
        return self._load()(*arguments, **options)

    def __getattr__(self, attribute: str) -> object:
        # Python probes for special methods, copying and inspecting do: no reason to load torch.
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return getattr(self._load(), attribute)

    def _load(self) -> type:
        return getattr(importlib.import_module(self._module), self._name)


class RegistryWatcher:
    """A finder that finds nothing itself: it lets the others find REGISTRY, and has the entries made after that ran."""

    @staticmethod
    def find_spec(name: str, path: list[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The registry's own spec, its loader extended; None for any other module."""
        if name != REGISTRY:
            return None
        for finder in sys.meta_path:
            # A finder without find_spec is a leftover of old import hooks; importlib passes over it too.
            if finder is RegistryWatcher or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                _extend(spec)
                return spec
        return None


def install() -> None:
    """Register the format now or as soon as transformers' registry is imported. Calling it again changes nothing."""
    if RegistryWatcher not in sys.meta_path:
        sys.meta_path.insert(0, RegistryWatcher)
    # After the finder is in place, so that no import by another thread slips between the two; one under way is waited for.
    if REGISTRY in sys.modules:
        register(importlib.import_module(REGISTRY))


def register(registry: ModuleType) -> None:
    """Make the entries in `registry`, transformers' module of that name, unless they are there."""
    for mapping, (module, name) in ENTRIES.items():
        present = getattr(registry, mapping).setdefault(METHOD, DeferredClass(module, name))
        if not isinstance(present, DeferredClass):
            warnings.warn(f"{present} is registered for {METHOD!r} models already: qtipcli is not used for them", stacklevel=2)


def _extend(spec: ModuleSpec) -> None:
    loader = spec.loader
    execute = loader.exec_module

    def execute_and_register(module: ModuleType) -> None:
        execute(module)
        register(module)

    # On this one loader, not around it: whoever asks the spec for source or resources still meets the real one.
    loader.exec_module = execute_and_register
