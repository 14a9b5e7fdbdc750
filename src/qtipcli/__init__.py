"""qtipcli: trellis-coded quantization of language models. `import qtipcli` is all it takes for transformers to load one.

Importing this package loads neither torch nor transformers.
"""

from qtipcli import registration

registration.install()


def __getattr__(name: str) -> str:
    """`__version__`, looked up when it is asked for: importlib.metadata costs more than the rest of this import."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("qtipcli")
    except PackageNotFoundError:
        # Run from a checkout with PYTHONPATH=src:kernels.
        return "0+uninstalled"
