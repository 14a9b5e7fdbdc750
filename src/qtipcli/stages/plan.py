"""Owns the plan of a job: what would be done to each layer, and what it would take in bytes, memory and time.

Sizes come from headers and are exact; memory is added up (stages/memory.py); time is measured on this machine.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import nn

from qtipcli.config import QuantizeSettings
from qtipcli.job.shards import shard_bytes
from qtipcli.model.linears import find_linears, left_exact, refuse_unsupported, unsupported
from qtipcli.model.skeleton import Skeleton
from qtipcli.nn.layout import PackedLayout
from qtipcli.quant.transform import Transform
from qtipcli.stages import outer, pack
from qtipcli.stages.rounder import refuse_unused_patterns

DTYPES = {"I32": torch.int32, "F16": torch.float16}
"""Of a packed layer's own parts."""

WRITE_BYTES_PER_S = 200e6
"""At which a packed directory is written, read again and its checksums made: not measured, since nothing is written."""

LOAD_BYTES_PER_S = 2e9
"""At which transformers loads weights that the system has in its file cache: not measured here, since none are read."""

TEXT = "reading the text"
"""The phase that a dry run goes through itself."""

ON_GPU = "on a GPU memory is added up by the same rule, which was measured on CPUs only"
"""A note."""

LEFT_SHAPES = 2
"""Dimensions from which on a tensor that is left as it is gets a reason: norms and biases are never rounded."""


@dataclass(frozen=True, slots=True)
class LayerKind:
    """Layers or tensors that are alike. name: with numbers as *. count: of them. shape: of each. bits: of the payload, None
    where it is left as it is. code: of the trellis, or the dtype that is kept. bytes: stored, of all. why: it is left.
    """

    name: str
    count: int
    shape: tuple[int, ...]
    bits: float | None
    code: str
    bytes: int
    why: str = ""


@dataclass(frozen=True, slots=True)
class Stored:
    """What a packed directory takes. weights: its safetensors files, to the byte. index: their index, to the byte.
    copied: tokenizer and other files of the original. bits_per_weight: of the packed layers, as stored.
    """

    weights: int
    files: int
    index: int
    copied: int
    bits_per_weight: float


@dataclass(frozen=True, slots=True)
class Plan:
    """What a command would do and take.

    layers: largest first. stored: None where the command packs nothing. ram: phase -> bytes, the process's own included;
    vram: the same of a GPU, empty where none would be used. disk: what -> bytes. seconds: step -> seconds. notes: what the
    prediction rests on. tables: title -> rows of what else is to be said.
    """

    command: str
    model: str
    layers: tuple[LayerKind, ...]
    stored: Stored | None
    ram: Mapping[str, int]
    vram: Mapping[str, int]
    disk: Mapping[str, int]
    seconds: Mapping[str, float]
    notes: tuple[str, ...]
    tables: Mapping[str, tuple[Mapping[str, Any], ...]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values, with the totals."""
        totals = {
            "peak_ram": max(self.ram.values(), default=None),
            "peak_vram": max(self.vram.values(), default=None),
            "total_disk": sum(self.disk.values()),
            "total_seconds": sum(self.seconds.values()),
        }
        return asdict(self) | totals


def on_cpu(phases: Mapping[str, int], resident: int, reading: int) -> dict[str, dict[str, int]]:
    """Memory of a command on a CPU. phases: bytes beside the process's own, `resident`. reading: peak while text is read."""
    return {"ram": {TEXT: reading} | {phase: resident + size for phase, size in phases.items()}, "vram": {}}


def layouts_of(skeleton: Skeleton, settings: QuantizeSettings) -> tuple[dict[str, PackedLayout], dict[str, str]]:
    """(name -> layout of every layer that would be packed, name -> why another one would be left).

    Layers that the text never reaches would be left too, which only a run can tell. Raises what quantize.run raises.
    """
    refuse_unsupported(skeleton)
    refuse_unused_patterns(skeleton, settings)
    transform = Transform.parse(settings.transform)
    packed: dict[str, PackedLayout] = {}
    left: dict[str, str] = {}
    for prefix, block in skeleton.blocks:
        for name, linear in find_linears(block).items():
            full = f"{prefix}.{name}"
            if _first_match(full, settings.skip) is not None:
                left[full] = "skipped by the settings"
                continue
            pattern = _first_match(full, settings.layers)
            spec = settings.spec(None if pattern is None else settings.layers[pattern])
            has_bias = linear.bias is not None
            packed[full] = PackedLayout(linear.in_features, linear.out_features, spec, transform, transform, has_bias)
        left |= {f"{prefix}.{name}": why for name, why in left_exact(block).items()}
        left |= {f"{prefix}.{name.rpartition('.')[0]}": why for name, why in unsupported(block)}
    for matrix in outer.plan(skeleton, settings).values():
        rows, columns = matrix.shape
        packed[matrix.name] = PackedLayout(
            columns, rows, matrix.spec, transform, matrix.transform_out, matrix.bias, matrix.embedding
        )
        left |= matrix.left()
    return packed, left


def stored_of(
    skeleton: Skeleton, packed: Mapping[str, PackedLayout], max_shard_size: str = "5GB"
) -> tuple[Stored, dict[str, torch.Tensor]]:
    """(what the packed directory would take, its tensors on meta), by the pack stage's own plan."""
    tensors = pack.stored_tensors(skeleton, packed, lambda layer: _parts(packed[layer]))
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)
    files = [shard_bytes({name: tensors[name] for name in names}) for names in split.filename_to_tensors.values()]
    index = pack.index_text(pack.index_of(split, pack.parameter_count(skeleton)))
    copied = [file.stat().st_size for file in pack.other_files(skeleton.source.directory)]
    bits = sum(layout.stored_bits for layout in packed.values()) / max(1, sum(layout.weights for layout in packed.values()))
    return Stored(sum(files), len(files), len(index.encode()), sum(copied), bits), tensors


def kinds_of(
    skeleton: Skeleton, packed: Mapping[str, PackedLayout], left: Mapping[str, str], tensors: Mapping[str, torch.Tensor]
) -> tuple[LayerKind, ...]:
    """The rows of the table, the largest first; together they have all bytes of the tensors."""
    linears = {name for name, module in skeleton.model.named_modules() if type(module) is nn.Linear}
    found: dict[tuple[Any, ...], tuple[int, int]] = {}

    def add(name: str, shape: tuple[int, ...], bits: float | None, code: str, size: int, why: str = "") -> None:
        key = (starred(name), shape, bits, code, why)
        count, total = found.get(key, (0, 0))
        found[key] = count + 1, total + size

    for name, layout in packed.items():
        shape = (layout.out_features, layout.in_features)
        add(name, shape, layout.spec.bits, layout.spec.code, layout.stored_bits // 8)
    parts = {f"{name}.{part}" for name, layout in packed.items() for part in layout.tensors() if part != "bias"}
    for name, tensor in tensors.items():
        if name in parts:
            continue
        module = name.rpartition(".")[0]
        why = left.get(module, "outside the decoder blocks" if module in linears else "not a linear layer")
        why = why if tensor.ndim >= LEFT_SHAPES else ""
        add(name, tuple(tensor.shape), None, str(tensor.dtype).removeprefix("torch."), tensor.nbytes, why)
    kinds = [
        LayerKind(name, count, shape, bits, code, size, why) for (name, shape, bits, code, why), (count, size) in found.items()
    ]
    return tuple(sorted(kinds, key=lambda kind: -kind.bytes))


def starred(name: str) -> str:
    """A name with its numbers as *, the same for layers of all blocks."""
    return re.sub(r"(?<![A-Za-z_])\d+", "*", name)


def _parts(layout: PackedLayout) -> dict[str, torch.Tensor]:
    """What the pack stage stores of a layer, on meta; the bias is the model's own."""
    parts = {
        part: torch.empty(tensor.shape, dtype=DTYPES[tensor.dtypes[0]], device="meta")
        for part, tensor in layout.tensors().items()
        if part not in ("weight", "bias")
    }
    return parts | {"weight": torch.empty(0, dtype=pack.EMPTY_WEIGHT_DTYPE, device="meta")}


def _first_match(name: str, patterns: Any) -> str | None:
    return next((pattern for pattern in patterns if fnmatch.fnmatchcase(name, pattern)), None)
