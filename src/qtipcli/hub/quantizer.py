"""Owns how transformers loads and saves a packed model: QtipHfQuantizer, which qtipcli.registration makes known to it.

Only hooks that kept their signature through transformers 5 are overridden.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

# Through the module that transformers itself comes in by: importing its parts in another order deadlocks with a thread that
# imports transformers at the same time.
from transformers.quantizers.auto import HfQuantizer

from qtipcli.errors import QtipError
from qtipcli.hub.config import QtipConfig
from qtipcli.hub.tensors import check_tensors
from qtipcli.nn import fused, plain, swap

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class QtipHfQuantizer(HfQuantizer):
    """Swaps packed modules in before the weights are loaded; after, freezes them and fuses those that share their input."""

    requires_calibration = True
    quantization_config: QtipConfig
    _replaced: Mapping[str, torch.nn.Module] = MappingProxyType({})

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        _refuse_tensor_parallel(model)
        if files := kwargs.get("checkpoint_files"):
            check_tensors(self.quantization_config.layouts(), files)
        # Names in the table of layers are those of linears: also of experts that transformers fuses, and in Conv1D's place.
        self._replaced = plain.make_plain(model).replaced
        # The files carry the names of the class that saved the model; the one being loaded may lack or add a prefix.
        names = _names_in(model, list(self.quantization_config.layers))
        if any(here != there for here, there in names.items()) or len(names) != len(self.quantization_config.layers):
            self.quantization_config = self.quantization_config.renamed(names)
        layouts = self.quantization_config.layouts()
        heads = _tied_heads(model, [name for name, layout in layouts.items() if layout.embedding])
        _refuse_tied(model, [name for name, layout in layouts.items() if not layout.embedding])
        swap.swap(model, layouts, heads)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        _refuse_tensor_parallel(model)
        # The loader makes every floating tensor it sets ask for a gradient.
        for module in swap.packed_modules(model).values():
            module.requires_grad_(False)
        fused.fuse(model)
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        # save_pretrained leaves the dtype's name in model.config, and that is what a later dequantize() is given.
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype)
        swap.dequantize(model, dtype or model.dtype)
        plain.restore(model, self._replaced)
        return model

    def is_serializable(self) -> bool:
        """Packed models save and reload without a change."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Gradients reach the inputs of packed layers, so that adapters and norms can be trained."""
        return True


def _names_in(model: PreTrainedModel, names: list[str]) -> dict[str, str]:
    """Name in config.json -> name in `model`, which may be the model without its head, or with one around it."""
    prefix = f"{model.base_model_prefix}."
    modules = {name for name, _ in model.named_modules()}
    if not any(name in modules for name in names):
        inner = {name: name.removeprefix(prefix) for name in names if name.startswith(prefix)}
        if any(name in modules for name in inner.values()):
            return inner
        outer = {name: prefix + name for name in names}
        if any(name in modules for name in outer.values()):
            return outer
    return {name: name for name in names}


def _refuse_tensor_parallel(model: PreTrainedModel) -> None:
    distributed = getattr(model.config, "distributed_config", None)
    sizes = (getattr(distributed, "tp_size", None), getattr(model, "_tp_size", None))
    if any(isinstance(size, int) and size > 1 for size in sizes):
        raise QtipError(
            "packed layers cannot be cut by transformers' tensor parallelism",
            "load with device_map='auto' instead of a tp_plan",
        )


def _tied_heads(model: PreTrainedModel, embeddings: list[str]) -> dict[str, str]:
    """Name of each linear whose weight the model ties to a packed embedding -> that embedding's name."""
    ties = getattr(model, "all_tied_weights_keys", {})
    weights = {f"{name}.weight": name for name in embeddings}
    return {head.removesuffix(".weight"): weights[original] for head, original in ties.items() if original in weights}


def _refuse_tied(model: PreTrainedModel, names: list[str]) -> None:
    tied = getattr(model, "all_tied_weights_keys", {})
    for name in names:
        if f"{name}.weight" in {*tied.keys(), *tied.values()}:
            raise QtipError(
                f"layer {name} is packed, but the model ties its weight to another",
                "set tie_word_embeddings to false in config.json, or leave the layer unpacked",
            )
