"""Owns what a report says of a packed model's layers: their place in the model, their stored bits, and what rounding lost."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from transformers.utils import cached_file

from qtipcli.errors import QtipError
from qtipcli.model.source import CONFIG_FILE
from qtipcli.stages.inspect import read_config
from qtipcli.stages.pack import read_record

_IN_BLOCK = re.compile(r"(?P<stem>.*?)\.(?P<block>\d+)\.(?P<kind>.+)")

FLOW = (
    "qkv_proj", "q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "gate_proj", "up_proj", "down_proj",
)  # fmt: skip
"""Layers as most models call them, in the order of the computation; config.json has them in that of the alphabet."""


@dataclass(frozen=True)
class Layer:
    """One packed layer.

    Attributes:
        name: in the model. block: number of its decoder block; None outside of them.
        kind: what layers at the same place in other blocks are called too, such as "self_attn.q_proj"; experts share one.
        shape, code, bits: outputs x inputs, code and payload bits a weight. bits_per_weight: as stored.
        loss: relative proxy loss; None where the record does not say.
    """

    name: str
    block: int | None
    kind: str
    shape: tuple[int, int]
    code: str
    bits: float
    bits_per_weight: float
    loss: float | None


def layers_of(model: str) -> list[Layer]:
    """The packed layers of a model, in their order in the model; none for one that qtip did not pack, or that is damaged.

    Read from config.json and qtip.json alone, on disk or in the hub's cache.
    """
    try:
        directory = Path(model) if Path(model).is_dir() else Path(cached_file(model, CONFIG_FILE, local_files_only=True)).parent
        layouts = read_config(directory).layouts()
        reports = (read_record(directory) or {}).get("layers", {})
    except (QtipError, OSError):
        return []
    found = []
    for name, layout in layouts.items():
        place = _IN_BLOCK.fullmatch(name)
        found.append(
            Layer(
                name=name,
                block=int(place["block"]) if place else None,
                kind=re.sub(r"\d+", "*", place["kind"]) if place else name,
                shape=(layout.out_features, layout.in_features),
                code=layout.spec.code,
                bits=layout.spec.bits,
                bits_per_weight=layout.stored_bits / layout.weights,
                loss=reports.get(name, {}).get("relative_proxy_loss"),
            )
        )
    return sorted(found, key=lambda layer: (layer.block is None, layer.block or 0))


def kinds_of(layers: list[Layer]) -> dict[str, list[Layer]]:
    """Kind -> its layers in order of their blocks, for layers in blocks; kinds in the order in which data flows."""
    found: dict[str, list[Layer]] = {}
    for layer in layers:
        if layer.block is not None:
            found.setdefault(layer.kind, []).append(layer)
    flow = {name: place for place, name in enumerate(FLOW)}
    return dict(sorted(found.items(), key=lambda item: flow.get(item[0].rpartition(".")[2], len(flow))))
