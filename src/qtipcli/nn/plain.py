"""Owns the exchange of modules that compute as linears do for plain torch.nn.Linears, and back.

These are experts fused into one tensor, linears whose weight is stored transposed (GPT-2's Conv1D), and subclasses of
torch.nn.Linear that compute what it does. None is known by name: a module without submodules whose parameters are a matrix and
perhaps a vector is tried with small random numbers. After the exchange all that rounds, packs and loads sees linears only.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from qtipcli.nn.experts import SeparateExperts, is_fused, is_transposed

TRIED_SIZES = (5, 3)
"""Inputs and outputs of the small twin by which a module is tried; of a square one, the first for both."""

TOLERANCE = 1e-5
"""Sums of five products of float32 numbers of size one err by less than a tenth of it."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where the parameter of a plain linear lies in the model as transformers builds it.

    name: of the parameter there. expert: its index in the first dimension, None where it is the whole tensor.
    transposed: whether it lies there as [in, out].
    """

    name: str
    expert: int | None = None
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class Exchange:
    """origins: name of each new parameter -> where it lies in the original. replaced: name -> the module that was there."""

    origins: Mapping[str, Origin]
    replaced: Mapping[str, nn.Module]


def make_plain(model: nn.Module) -> Exchange:
    """Replace, in place, every module of `model` that computes as linears do by unfilled plain linears, on its device.

    Modules whose parameters the model holds elsewhere too (tied weights) stay.
    """
    tied = _tied(model)
    origins: dict[str, Origin] = {}
    replaced: dict[str, nn.Module] = {}
    for name, module in list(model.named_modules()):
        if any(id(parameter) in tied for parameter in module.parameters(recurse=False)) or not name:
            continue
        if is_fused(module):
            origins |= _expert_origins(name, module)
            replaced[name] = module
            model.set_submodule(name, SeparateExperts(module))
        elif type(module) is not nn.Linear and (kind := _tried(module)) is not None:
            origins |= {f"{name}.{leaf}": Origin(f"{name}.{leaf}", None, kind and leaf == "weight") for leaf in _leaves(module)}
            replaced[name] = module
            model.set_submodule(name, _plain(module, kind))
    return Exchange(origins, replaced)


def restore(model: nn.Module, replaced: Mapping[str, nn.Module]) -> None:
    """Put back, in place, what `make_plain` replaced, with the weights that the linears have now; they must be plain ones."""
    for name, module in replaced.items():
        own = model.get_submodule(name)
        if isinstance(own, SeparateExperts):
            model.set_submodule(name, own.joined())
            continue
        turn = _tried(module)
        for leaf in _leaves(module):
            tensor = getattr(own, leaf).detach()
            turned = tensor.T.contiguous() if turn and leaf == "weight" else tensor
            module._parameters[leaf] = nn.Parameter(turned, requires_grad=tensor.requires_grad)
        model.set_submodule(name, module.train(own.training))


def _tied(model: nn.Module) -> set[int]:
    seen: set[int] = set()
    twice: set[int] = set()
    for _, parameter in model.named_parameters(remove_duplicate=False):
        (twice if id(parameter) in seen else seen).add(id(parameter))
    return twice


def _expert_origins(name: str, fused: nn.Module) -> dict[str, Origin]:
    found = {}
    for leaf, parameter in fused.named_parameters(recurse=False):
        projection, part = (leaf.removesuffix("_bias"), "bias") if leaf.endswith("_bias") else (leaf, "weight")
        for expert in range(len(parameter)):
            origin = Origin(f"{name}.{leaf}", expert, part == "weight" and is_transposed(fused))
            found[f"{name}.{expert}.{projection}.{part}"] = origin
    return found


def _leaves(module: nn.Module) -> list[str]:
    return [leaf for leaf, parameter in module._parameters.items() if parameter is not None]


def _plain(module: nn.Module, transposed: bool) -> nn.Linear:
    weight = module.weight
    inputs, outputs = weight.shape if transposed else weight.shape[::-1]
    linear = nn.Linear(inputs, outputs, bias=module._parameters.get("bias") is not None, device="meta", dtype=weight.dtype)
    return (linear if weight.is_meta else linear.to_empty(device=weight.device)).train(module.training)


def _tried(module: nn.Module) -> bool | None:
    """Whether a small twin of the module computes x W^T + b (False), x W + b (True: transposed), or something else (None)."""
    # A model is built under torch.device("meta"), where nothing has numbers.
    with torch.no_grad(), torch.device("cpu"):
        return _tried_on_cpu(module)


def _tried_on_cpu(module: nn.Module) -> bool | None:
    own = {leaf: getattr(module, leaf) for leaf in _leaves(module)}
    is_matrix = set(own) in ({"weight"}, {"weight", "bias"}) and own["weight"].ndim == 2
    if not is_matrix or len(list(module.children())) or len(list(module.buffers())) or isinstance(module, nn.Embedding):
        return None
    shape = tuple(own["weight"].shape)
    inputs, outputs = TRIED_SIZES if shape[0] != shape[1] else (TRIED_SIZES[0], TRIED_SIZES[0])
    generator = torch.Generator().manual_seed(0)
    x_NI = torch.randn(2, 4, inputs, generator=generator)
    weight_OI = torch.randn(outputs, inputs, generator=generator)
    for transposed in (False, True):
        before = shape if transposed else shape[::-1]
        if "bias" in own and tuple(own["bias"].shape) != before[1:]:
            continue
        bias_O = torch.randn(outputs, generator=generator) if "bias" in own else None
        found = _answer(module, weight_OI.T.contiguous() if transposed else weight_OI, bias_O, before, (inputs, outputs), x_NI)
        expected = functional.linear(x_NI, weight_OI, bias_O)
        if found is not None and found.shape == expected.shape and torch.allclose(found, expected, atol=TOLERANCE):
            return transposed
    return None


def _answer(
    module: nn.Module, weight: Tensor, bias: Tensor | None, before: tuple[int, ...], after: tuple[int, int], x: Tensor
) -> Tensor | None:
    """What a twin of the module with these parameters makes of x; None where it fails, or returns no tensor."""
    twin = copy.copy(module)
    resized = dict(zip(before, after, strict=True))
    twin.__dict__ = {
        name: resized.get(value, value) if type(value) is int else value for name, value in module.__dict__.items()
    }
    twin._parameters = {"weight": nn.Parameter(weight, requires_grad=False)}
    twin._parameters["bias"] = None if bias is None else nn.Parameter(bias, requires_grad=False)
    try:
        # Whatever a class from anywhere may raise for numbers it was not made for says that it is no linear.
        found = type(module).forward(twin, x)
    except Exception:
        return None
    return found if isinstance(found, Tensor) else None
