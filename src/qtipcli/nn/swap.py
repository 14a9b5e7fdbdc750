"""Owns the exchange of a model's linears and embeddings: plain -> packed by a table of layouts, and back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from qtipcli.errors import QtipError
from qtipcli.nn.embedding import TrellisEmbedding, TrellisHead
from qtipcli.nn.layout import PackedLayout
from qtipcli.nn.linear import TrellisLinear
from qtipcli.nn.module import PackedModule


def swap(model: nn.Module, layouts: Mapping[str, PackedLayout], heads: Mapping[str, str] | None = None) -> None:
    """Replace each named linear or embedding of `model`, in place, by an unfilled packed one on its device and of its dtype.

    layouts: module name -> layout. heads: name of each linear whose matrix is a packed embedding's -> name of that embedding.
    All are checked before the first is replaced. Modules that are not named stay untouched.
    Raises QtipError where a name is no such module of the model, or its sizes or bias are not the layout's.
    """
    modules = {name: _checked(model, name, layout) for name, layout in layouts.items()}
    _refuse_twice(modules)
    linears = {head: _checked(model, head, layouts[embedding], tied=True) for head, embedding in (heads or {}).items()}
    for name, module in modules.items():
        placed = {"device": module.weight.device, "dtype": module.weight.dtype}
        if isinstance(module, nn.Embedding):
            packed: nn.Module = TrellisEmbedding(layouts[name], **placed, padding_idx=module.padding_idx)
        else:
            packed = TrellisLinear(layouts[name], **placed)
        model.set_submodule(name, packed.train(module.training))
    for head, linear in linears.items():
        embedding = model.get_submodule(heads[head])
        model.set_submodule(head, TrellisHead(embedding).train(linear.training))


def packed_layers(model: nn.Module) -> dict[str, TrellisLinear]:
    """Every packed linear of `model` by its name; a head that is tied to a packed embedding has no weights and is none."""
    return {name: module for name, module in model.named_modules() if isinstance(module, TrellisLinear)}


def packed_modules(model: nn.Module) -> dict[str, PackedModule]:
    """Every module of `model` that holds a packed matrix, linear or embedding, by its name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedModule)}


def dequantize(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace every packed module of `model`, in place, by the plain one it stands for, with weights in `dtype`.

    A head that was tied to a packed embedding is tied to the plain one.
    Raises QtipError where a layer's weights are not in memory (on the meta device, or offloaded to disk).
    """
    packed = packed_modules(model)
    heads = {name: module for name, module in model.named_modules() if isinstance(module, TrellisHead)}
    for name, layer in packed.items():
        if layer.trellis.is_meta:
            raise QtipError(
                f"layer {name} cannot be dequantized: its weights are not in memory", "load the model without offloading"
            )
    for name, layer in packed.items():
        model.set_submodule(name, _dense(layer, nn.Parameter(layer.weight_dense(dtype))))
        # Fused layers hold each other; without this the packed weights would stay until Python looks for cycles.
        if isinstance(layer, TrellisLinear) and layer.group is not None:
            layer.group.dissolve()
    names = {id(layer): name for name, layer in packed.items()}
    for name, head in heads.items():
        model.set_submodule(name, _dense(head, model.get_submodule(names[id(head.embedding)]).weight))


def _checked(model: nn.Module, name: str, layout: PackedLayout, tied: bool = False) -> nn.Linear | nn.Embedding:
    """The module that is to be replaced; `tied`: a head, to which the layout of its embedding belongs."""
    try:
        module = model.get_submodule(name)
    # A name that leads to a list, a number or nothing.
    except (AttributeError, TypeError) as error:
        raise QtipError(
            f"{type(model).__name__} has no layer {name}", "check that config.json belongs to this model and model class"
        ) from error
    if layout.embedding and not tied:
        return _checked_embedding(module, name, layout)
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


def _refuse_twice(modules: Mapping[str, nn.Module]) -> None:
    """Raise QtipError where two names lead to one module, as through a property (`base_model`) of its model."""
    names: dict[int, str] = {}
    for name, module in modules.items():
        if (other := names.setdefault(id(module), name)) != name:
            raise QtipError(f"layers {other} and {name} are one module of the model", "take the original config.json")


def _checked_embedding(module: nn.Module, name: str, layout: PackedLayout) -> nn.Embedding:
    # Exactly: a subclass computes something else, such as Gemma's, which multiplies what it looks up.
    if type(module) is not nn.Embedding:
        raise QtipError(
            f"layer {name} is {type(module).__name__}, not a torch.nn.Embedding", "check the table of layers in config.json"
        )
    found, stated = (module.num_embeddings, module.embedding_dim), (layout.out_features, layout.in_features)
    if found != stated:
        raise QtipError(
            "embedding {} is {} x {} in the model".format(name, *found)
            + ", but {} x {} in the table of layers".format(*stated),
            "check that config.json belongs to this model",
        )
    return module


def _dense(layer: PackedModule | TrellisHead, weight: nn.Parameter) -> nn.Linear | nn.Embedding:
    # Built on meta, so that no time goes into random weights.
    outputs, inputs = weight.shape
    if isinstance(layer, TrellisEmbedding):
        embedding = nn.Embedding(outputs, inputs, layer.padding_idx, device="meta", dtype=weight.dtype)
        embedding.weight = weight
        return embedding.train(layer.training)
    linear = nn.Linear(inputs, outputs, bias=layer.bias is not None, device="meta", dtype=weight.dtype)
    linear.weight = weight
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.detach().to(weight.dtype))
    return linear.train(layer.training)
