"""Owns the exchange of a model's linears: nn.Linear -> TrellisLinear by a table of layouts, and back to plain weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from qtipcli.errors import QtipError
from qtipcli.nn.layout import PackedLayout
from qtipcli.nn.linear import TrellisLinear


def swap(model: nn.Module, layouts: Mapping[str, PackedLayout]) -> None:
    """Replace each named linear of `model`, in place, by an unfilled TrellisLinear on the same device and of the same dtype.

    layouts: module name -> layout. All are checked before the first is replaced. Modules that are not named stay untouched.
    Raises QtipError where a name is no linear of the model, or its sizes or bias are not the layout's.
    """
    linears = {name: _checked_linear(model, name, layout) for name, layout in layouts.items()}
    for name, linear in linears.items():
        packed = TrellisLinear(layouts[name], device=linear.weight.device, dtype=linear.weight.dtype)
        model.set_submodule(name, packed.train(linear.training))


def packed_layers(model: nn.Module) -> dict[str, TrellisLinear]:
    """Every packed linear of `model` by its name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, TrellisLinear)}


def dequantize(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace every TrellisLinear of `model`, in place, by the nn.Linear it stands for, with weights in `dtype`.

    Raises QtipError where a layer's weights are not in memory (on the meta device, or offloaded to disk).
    """
    packed = packed_layers(model)
    for name, layer in packed.items():
        if layer.trellis.is_meta:
            raise QtipError(
                f"layer {name} cannot be dequantized: its weights are not in memory", "load the model without offloading"
            )
    for name, layer in packed.items():
        model.set_submodule(name, _dense(layer, dtype))
        # Fused layers hold each other; without this the packed weights would stay until Python looks for cycles.
        if layer.group is not None:
            layer.group.dissolve()


def _checked_linear(model: nn.Module, name: str, layout: PackedLayout) -> nn.Linear:
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise QtipError(
            f"{type(model).__name__} has no layer {name}", "check that config.json belongs to this model and model class"
        ) from error
    if not isinstance(module, nn.Linear):
        raise QtipError(f"layer {name} is {type(module).__name__}, not a linear", "check the table of layers in config.json")
    found = (module.out_features, module.in_features, module.bias is not None)
    stated = (layout.out_features, layout.in_features, layout.bias)
    if found != stated:
        raise QtipError(
            "layer {} is {} x {} with bias {} in the model".format(name, *found)
            + ", but {} x {} with bias {} in the table of layers".format(*stated),
            "check that config.json belongs to this model",
        )
    return module


def _dense(layer: TrellisLinear, dtype: torch.dtype) -> nn.Linear:
    # Built on meta, so that no time goes into random weights.
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta", dtype=dtype)
    linear.weight = nn.Parameter(layer.weight_dense(dtype))
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.detach().to(dtype))
    return linear.train(layer.training)
