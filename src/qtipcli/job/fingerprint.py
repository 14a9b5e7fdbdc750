"""Owns fingerprints: what a job's inputs were, small enough for job.json and exact enough to refuse to mix two models.

A weight file counts as the same if its size, its whole header (names, dtypes, shapes, offsets) and 64 evenly spaced samples of
64 KiB are the same. That reads 4 MiB a file instead of 100 GB a model: it tells fine-tunes, conversions and cut-off copies
apart, since these change every sample or the size, but it is not made to find a single changed bit. A file of up to 4 MiB is
read whole.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from pathlib import Path
from typing import Any

from qtipcli.errors import QtipError, storage_error
from qtipcli.job.files import sha256_file
from qtipcli.job.header import read_header

_SAMPLES = 64
_SAMPLE_BYTES = 64 * 2**10
# What else decides the model: its architecture, and which file each tensor is taken from.
_SMALL_FILES = ("config.json", "model.safetensors.index.json")
# The packages whose versions can change a result.
_PACKAGES = ("qtipcli", "torch", "transformers", "numba")


def fingerprint_model(directory: Path) -> dict[str, Any]:
    """What identifies the model in a local directory: file name -> {"bytes": size, "sha256": of the samples}, and file name ->
    sha256 of the whole for config.json and the index.

    Raises QtipError if there is no safetensors file, CorruptError if one is cut off or no safetensors file, StorageError.
    """
    directory = Path(directory)
    try:
        files = sorted(directory.iterdir())
    except OSError as error:
        raise storage_error(error, directory, "read") from error
    weights = [path for path in files if path.suffix == ".safetensors"]
    if not weights:
        raise QtipError(f"{directory} has no *.safetensors weights", "give a directory or a hub name that has them")
    record: dict[str, Any] = {path.name: sha256_file(path) for path in files if path.name in _SMALL_FILES}
    record |= {path.name: _fingerprint_weights(path) for path in weights}
    return record


def _fingerprint_weights(path: Path) -> dict[str, Any]:
    header = read_header(path)
    digest = hashlib.sha256(header.raw)
    size = header.file_bytes
    try:
        with path.open("rb") as file:
            if size <= _SAMPLES * _SAMPLE_BYTES:
                digest.update(file.read())
            else:
                for sample in range(_SAMPLES):  # from the first byte to the last
                    file.seek((size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                    digest.update(file.read(_SAMPLE_BYTES))
    except OSError as error:
        raise storage_error(error, path, "read") from error
    return {"bytes": size, "sha256": digest.hexdigest()}


def fingerprint_bytes(*parts: bytes | memoryview) -> str:
    """The sha256, as hex, of parts whose borders count: ("ab", "c") and ("a", "bc") differ."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def fingerprint_text(*parts: str) -> str:
    """The sha256, as hex, of texts whose borders count."""
    return fingerprint_bytes(*(part.encode("utf-8", "surrogatepass") for part in parts))


def fingerprint_versions() -> dict[str, str]:
    """Package -> version (see `package_version`) for the packages that can change a result."""
    return {package: package_version(package) for package in _PACKAGES}


def package_version(package: str) -> str:
    """The "major.minor" that is installed, or "source" where the package runs without being installed."""
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "source"
    return ".".join(version.split("+")[0].split(".")[:2])
