"""Owns what packed layers need of disk offload: that their tensors are read in the dtypes that they were stored in.

transformers 5.10.4 (no longer 5.17.0) has accelerate read every offloaded tensor in the model's dtype, through which the words
of a trellis come back rounded to 24 bits, without an error.
"""

from __future__ import annotations

from torch import nn

from qtipcli.nn.swap import packed_modules


def keep_stored_dtypes(model: nn.Module) -> None:
    """Set the dtype in the entry of each offloaded packed tensor, in accelerate's index, to the parameter's own."""
    for module in packed_modules(model).values():
        weights = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        index = getattr(getattr(weights, "dataset", None), "index", None) or {}
        for name, parameter in module.named_parameters(recurse=False):
            if entry := index.get(f"{getattr(weights, 'prefix', '')}{name}"):
                entry["dtype"] = str(parameter.dtype).removeprefix("torch.")
