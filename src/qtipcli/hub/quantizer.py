"""Owns how transformers loads and saves a packed model: QtipHfQuantizer, which qtipcli.registration makes known to it.

Only hooks that kept their signature through transformers 5 are overridden.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

# Through the module that transformers itself comes in by: importing its parts in another order deadlocks with a thread that
# imports transformers at the same time.
from transformers.quantizers.auto import HfQuantizer

from qtipcli.errors import CorruptError, QtipError
from qtipcli.hub import remote_code
from qtipcli.hub.config import QtipConfig
from qtipcli.hub.offload import keep_stored_dtypes
from qtipcli.hub.tensors import REMEDY, check_tensors
from qtipcli.nn import fused, plain, swap
from qtipcli.untrusted import is_inside, refuse_impossible

if TYPE_CHECKING:
    from transformers import PreTrainedModel


LOADED = "_is_hf_initialized"
"""What transformers' loader marks the parameters with that it has found in a file, or tied to one of those."""


class QtipHfQuantizer(HfQuantizer):
    """Swaps packed modules in before the weights are loaded; after, freezes them and fuses those that share their input."""

    requires_calibration = True
    quantization_config: QtipConfig
    _replaced: Mapping[str, torch.nn.Module] = MappingProxyType({})

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        _refuse_tensor_parallel(model)
        remote_code.forget(model.config)
        self.place_modules(model, kwargs.get("checkpoint_files"))
        self._shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    def update_attn_implementation(self, config: Any, *others: Any) -> Any:
        """Refuse sizes that no model has before transformers builds one of them; newer versions ask this before they build."""
        refuse_impossible(config.to_dict(), config.name_or_path)
        return getattr(super(), "update_attn_implementation", lambda config, *others: config)(config, *others)

    def place_modules(self, model: PreTrainedModel, files: Sequence[str | Path] | None) -> None:
        """Swap unfilled packed modules into `model`, which may be on meta, in place.

        files: the checkpoint, whose tensors are checked against the table of layers by their headers; None checks nothing.
        Raises QtipError where the table is not this model's, CorruptError where the files are not the table's.
        """
        if files:
            _refuse_outside(model, files)
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
        _refuse_random_weights(model, self._shapes)
        # The loader makes every floating tensor it sets ask for a gradient.
        for name, module in swap.packed_modules(model).items():
            module.requires_grad_(False)
            _refuse_not_finite(name, module)
        keep_stored_dtypes(model)
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


def _refuse_outside(model: PreTrainedModel, files: Sequence[str | Path]) -> None:
    """Raise CorruptError where the index of a local directory led transformers to files outside of it, by their names."""
    directory = model.config.name_or_path
    if not directory or not Path(directory).is_dir():
        return
    for file in files:
        if not is_inside(os.path.relpath(os.path.normpath(file), os.path.normpath(directory))):
            raise CorruptError(f"the index names a file outside the model directory: {file}", "do not use this model's files")


def _refuse_not_finite(name: str, module: torch.nn.Module) -> None:
    """Raise CorruptError where a scale or table is NaN or infinite; trellis words are valid whatever they are."""
    for part in ("scale_in", "scale_out", "lut"):
        tensor = getattr(module, part, None)
        if tensor is not None and not tensor.is_meta and not torch.isfinite(tensor).all():
            raise CorruptError(f"tensor {name}.{part} holds NaN or infinite values", REMEDY)


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


def _refuse_random_weights(model: PreTrainedModel, shapes: Mapping[str, torch.Size]) -> None:
    """Raise CorruptError where a parameter comes from no file, for which transformers draws random numbers and only warns.

    shapes: of the parameters before they were loaded; old versions take what is in a file in whatever shape it has.
    Left to transformers' warning is what the saved model never had: a new head on it, to be trained, that is not the one that
    predicts tokens. Offloaded parameters are not in memory; the loader fails by itself where it does not find them.
    """
    saved = model.config.architectures if isinstance(model.config.architectures, list) else [type(model).__name__]
    inner, head = model.base_model, model.get_output_embeddings()
    for prefix, module in model.named_modules():
        is_new = type(model).__name__ not in saved and prefix and not _is_within(module, inner) and module is not head
        for own, parameter in module.named_parameters(recurse=False):
            name = f"{prefix}.{own}" if prefix else own
            is_loaded = parameter.is_meta or getattr(parameter, LOADED, False)
            if not (is_new or (is_loaded and parameter.shape == shapes.get(name, parameter.shape))):
                raise CorruptError(f"tensor {name} is in none of the model's files, or not in its shape", REMEDY)


def _is_within(module: torch.nn.Module, outer: torch.nn.Module) -> bool:
    return any(module is each for each in outer.modules())


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
