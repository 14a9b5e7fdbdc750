"""Owns the reading of a packed directory tensor by tensor, and the writing of one that differs from it in some of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtipcli.errors import QtipError
from qtipcli.hub.published import published
from qtipcli.hub.tensors import check_tensors
from qtipcli.job.files import write_atomic, write_text_atomic
from qtipcli.job.header import read_header
from qtipcli.job.shards import open_shard, write_shard
from qtipcli.nn.linear import TrellisLinear
from qtipcli.stages import card
from qtipcli.stages.inspect import read_config
from qtipcli.stages.pack import LOCAL_FILE, NOT_COPIED, copy_other_files, read_record, write_record
from qtipcli.stages.progress import Silent
from qtipcli.stages.tune_blocks import packed_layer
from qtipcli.stages.whole import INDEX_FILE, check_complete, written_whole
from qtipcli.untrusted import read_table

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


class PackedDirectory:
    """A packed directory, its tensors checked by their headers.

    Attributes: path; config: its QtipConfig; layouts: name -> layout of every packed layer.
    Raises QtipError where it is no packed model, CorruptError where a tensor is missing or of another shape.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_config(path)
        self.layouts = self.config.layouts()
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise QtipError(f"{path} holds no weights", "pack it again, or finish the download")
        check_tensors(self.layouts, files)
        self._headers = {file: read_header(file).tensors for file in files}
        self._file = {name: file for file, tensors in self._headers.items() for name in tensors}

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        with open_shard(self._file[name]) as shard:
            return shard.get_tensor(name)

    def dtype(self, name: str) -> torch.dtype | None:
        """The dtype on disk of a floating tensor; None where there is no such tensor."""
        file = self._file.get(name)
        return None if file is None else _DTYPES.get(self._headers[file][name]["dtype"])

    def layers(self, prefix: str) -> dict[str, TrellisLinear]:
        """Full name -> packed layer, for those of one block."""
        found = {}
        for name, layout in self.layouts.items():
            if name.startswith(f"{prefix}."):
                parts = {part: self.read(f"{name}.{part}") for part in layout.tensors() if part != "weight"}
                found[name] = packed_layer(layout, parts)
        return found

    def vectors(self, prefix: str = "") -> dict[str, torch.dtype]:
        """Full name -> dtype on disk of the norms and biases: floating vectors that are no part of the packing."""
        stem = f"{prefix}." if prefix else ""
        parts = {f"{name}.{part}" for name in self.layouts for part in ("scale_in", "scale_out", "lut", "weight")}
        return {
            name: _DTYPES[entry["dtype"]]
            for tensors in self._headers.values()
            for name, entry in tensors.items()
            if name.startswith(stem) and name not in parts and len(entry["shape"]) == 1 and entry["dtype"] in _DTYPES
        }

    def write_changed(
        self, out: Path, changed: Mapping[str, Tensor], provenance: Mapping[str, Any], record: Mapping[str, Any]
    ) -> None:
        """Write to `out` this model with the tensors of `changed` in the place of its own; complete or not at all.

        provenance, record: added to those of config.json and qtip.json. Raises QtipError where a tensor would change its shape
        or dtype, StorageError.
        """
        with written_whole(out) as partial:
            for file, tensors in self._headers.items():
                with open_shard(file) as shard:
                    content = {name: changed.get(name, shard.get_tensor(name)) for name in tensors}
                    for name in tensors.keys() & changed.keys():
                        own = shard.get_tensor(name)
                        if own.shape != changed[name].shape or own.dtype != changed[name].dtype:
                            raise QtipError(
                                f"{name} was tuned as {changed[name].dtype} {list(changed[name].shape)}, not as it is"
                            )
                    write_shard(partial / file.name, content)
            copy_other_files(self.path, partial, NOT_COPIED)
            config = read_table(self.path / "config.json", "pack or download the model again")
            fields = config["quantization_config"]
            fields["provenance"] = published({**fields.get("provenance", {}), **provenance})
            write_text_atomic(partial / "config.json", json.dumps(config, indent=2) + "\n")
            kept = self._kept_record()
            write_record(partial, {**kept, **published(dict(record))})
            self._write_card(partial, {**kept, **record})
            for name in (LOCAL_FILE, INDEX_FILE):
                self._copy(name, partial)

    def check_changed(self, out: Path, record: Mapping[str, Any]) -> None:
        """Raise CorruptError unless `out` is what `write_changed` made of it with this record, to the last bit."""
        index = self.path / INDEX_FILE
        text = index.read_text(encoding="utf-8") if index.is_file() else None
        check_complete(out, {**self._kept_record(), **published(dict(record))}, lambda: text)
        self._copy(LOCAL_FILE, out)

    def _kept_record(self) -> dict[str, Any]:
        """What qtip.json keeps of this directory's own."""
        before = read_record(self.path) or {}
        # Not under "job": by that the pack stage knows what it made itself.
        kept = {"format": "qtip", "quantize": before.get("job", before.get("quantize")), "layers": before.get("layers", {})}
        return kept | {name: before[name] for name in ("calibration",) if name in before}

    def _copy(self, name: str, out: Path) -> None:
        if (self.path / name).is_file():
            write_atomic(out / name, [(self.path / name).read_bytes()])

    def _write_card(self, partial: Path, record: Mapping[str, Any]) -> None:
        index_file = self.path / INDEX_FILE
        index = read_table(index_file, "pack or download the model again") if index_file.is_file() else {}
        card.write(partial, read_config(partial), record, index, card.inherited_from(self.path, Silent()))
