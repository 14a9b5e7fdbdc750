"""Owns the check of a packed directory: every tensor's shape and dtype, every scale finite, every file's checksum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qtipcli.errors import CorruptError, QtipError
from qtipcli.hub.config import METHOD, QtipConfig
from qtipcli.hub.tensors import check_tensors
from qtipcli.job.shards import open_shard
from qtipcli.model.source import index_weight_map
from qtipcli.stages.pack import read_record
from qtipcli.stages.whole import INDEX_FILE, REMEDY, check_files
from qtipcli.untrusted import read_table


def run(directory: Path) -> dict[str, Any]:
    """What a packed directory holds, after all of it was checked.

    Returns {"bits_per_weight", "bytes", "parameters", "rows": one a layer}, and "allocation" where one was measured.
    Raises QtipError where it is no packed model or an unfinished one, CorruptError naming the first file or tensor that is not
    what was written.
    """
    config = read_config(directory)
    if not (directory / INDEX_FILE).is_file():
        raise QtipError(f"{directory} is unfinished: it has no {INDEX_FILE}", "pack it again, or finish the download")
    record = read_record(directory) or {}
    check_files(directory, record.get("sha256", {}))
    index = read_table(directory / INDEX_FILE, REMEDY)
    files = sorted({directory / name for name in index_weight_map(directory / INDEX_FILE).values()})
    layouts = config.layouts()
    check_tensors(layouts, files)
    _check_scales(files)
    losses = {name: report.get("relative_proxy_loss") for name, report in record.get("layers", {}).items()}
    metadata = index.get("metadata")
    parameters = metadata.get("total_parameters") if isinstance(metadata, dict) else None
    rows = [
        {
            "layer": name,
            "shape": [layout.out_features, layout.in_features],
            "code": layout.spec.code,
            "bits": layout.spec.bits,
            "state_bits": layout.spec.state_bits,
            "transform": " / ".join(dict.fromkeys((str(layout.transform_in), str(layout.transform_out)))),
            "bits_per_weight": layout.stored_bits / layout.weights,
            "relative_proxy_loss": losses.get(name),
        }
        for name, layout in layouts.items()
    ]
    return {
        "directory": str(directory),
        "bits_per_weight": config.bits_per_weight,
        "bytes": sum(file.stat().st_size for file in files),
        "parameters": parameters if type(parameters) is int else None,
        "not_converted": config.not_converted,
        "checksums": len(record.get("sha256", {})),
        "rows": rows,
    } | {key: record[key] for key in ("allocation",) if key in record}


def read_config(directory: Path) -> QtipConfig:
    """The quantization_config of a packed directory. Raises QtipError where there is none."""
    file = directory / "config.json"
    if not file.exists():
        raise QtipError(f"{directory} holds no model: there is no {file.name}", "give a directory that qtip packed")
    fields = read_table(file, "pack or download the model again").get("quantization_config")
    if not isinstance(fields, dict) or fields.get("quant_method") != METHOD:
        raise QtipError(f"{directory} is not a qtip model", "give a directory that qtip packed; qtip quantize makes one")
    return QtipConfig(**fields)


def _check_scales(files: list[Path]) -> None:
    for file in files:
        with open_shard(file) as shard:
            for name in shard.keys():  # noqa: SIM118, no mapping
                if name.endswith((".scale_in", ".scale_out", ".lut")) and not torch.isfinite(shard.get_tensor(name)).all():
                    raise CorruptError(f"tensor {name} in {file} holds NaN or infinite values", "pack or download it again")
