"""Owns packed layers as a quantize job stores them: from what its ledger and its shards keep of a layer to the layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from qtipcli.errors import CorruptError, first_line
from qtipcli.nn.layout import PackedLayout
from qtipcli.nn.linear import TrellisLinear
from qtipcli.quant.transform import Transform
from qtipcli.stages.tune_blocks import packed_layer
from qtipcli_kernels.spec import TrellisSpec


def packed_layers(reports: Mapping[str, Mapping[str, Any]], tensors: Mapping[str, torch.Tensor]) -> dict[str, TrellisLinear]:
    """Full name -> layer, from what the ledger and the shard keep of them; biases are the model's own."""
    parts = ("trellis", "scale_in", "scale_out", "lut")
    return {
        name: packed_layer(
            layout_of(report), {part: tensors[f"{name}.{part}"] for part in parts if f"{name}.{part}" in tensors}
        )
        for name, report in reports.items()
    }


def layout_of(report: Mapping[str, Any]) -> PackedLayout:
    """The layout of a layer from what the ledger keeps of it. Raises CorruptError where that is not what was written."""
    try:
        spec = TrellisSpec(report["code"], report["bits_per_step"], report["state_bits"], report["weights_per_step"])
        sides = (Transform.parse(report["transform"]), Transform.parse(report.get("transform_out", report["transform"])))
        rows, columns = report["shape"]
        return PackedLayout(columns, rows, spec, *sides, report["bias"], report.get("embedding", False))
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptError(
            f"the ledger says of a layer what no ledger does: {first_line(error)}",
            "give the quantize command again with another --out",
        ) from error
