"""Owns what the tests of dry runs share: measurements that take no time, and a Hub that is a local directory."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo
from safetensors import safe_open

from qtipcli.model import remote
from qtipcli.stages import forward_rates, rates, rounding_rates, tuning_rates


def shorten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less time for measurements: these tests read no time."""
    monkeypatch.setattr(rounding_rates, "ENCODER_SECONDS", 0.0)
    monkeypatch.setattr(rounding_rates, "SIDES", (16, 32, 48))
    monkeypatch.setattr(rates, "BLOCK_SECONDS", 0.1)
    for module in (forward_rates, tuning_rates):
        monkeypatch.setattr(module, "HEAD_SECONDS", 0.0)


def stand_in_for_hub(monkeypatch: pytest.MonkeyPatch, directory: Path) -> list[Path]:
    """Every Hub model is this one, described by its headers; returns where its small files were put, as they are asked for."""
    where: list[Path] = []

    def download(name: str, local_dir: Path, **how: object) -> None:
        where.append(Path(local_dir))
        for file in directory.iterdir():
            if file.suffix == ".json":
                shutil.copyfile(file, Path(local_dir) / file.name)

    def metadata(name: str, revision: str | None = None) -> SafetensorsRepoMetadata:
        with safe_open(directory / "model.safetensors", "pt") as reader:
            views = {key: reader.get_slice(key) for key in reader.keys()}  # noqa: SIM118, no mapping
            tensors = {
                key: TensorInfo(dtype=view.get_dtype(), shape=view.get_shape(), data_offsets=(0, 0))
                for key, view in views.items()
            }
        file = SafetensorsFileMetadata(metadata={}, tensors=tensors)
        return SafetensorsRepoMetadata(None, False, dict.fromkeys(tensors, "model.safetensors"), {"model.safetensors": file})

    monkeypatch.setattr(remote, "snapshot_download", download)
    monkeypatch.setattr(remote, "get_safetensors_metadata", metadata)
    return where
