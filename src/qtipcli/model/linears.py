"""Owns the linears of one decoder block: which there are, which share an input, and the statistics of that input.

Dimensions in names: I input features, N tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qtipcli.errors import QtipError
from qtipcli.model.inputs import BlockInput, run_block
from qtipcli.model.skeleton import Skeleton
from qtipcli.nn.experts import SeparateExperts
from qtipcli_kernels.spec import TILE

# Tokens in one product x^T x: bounds the float32 copy of the input (2,048 x 16,384 x 4 bytes = 128 MiB) and fixes the order of
# the sum, which therefore depends only on how the rows were batched.
CHUNK_TOKENS = 2048

LARGEST_UNSUPPORTED_SHARE = 0.1
"""Share of the blocks' weights that may stay as it is without being asked for: routers and short convolutions, not experts."""


@dataclass(frozen=True)
class InputGroup:
    """Linears of a block that are given the very same input, such as query, key and value; they share one proxy Hessian.

    Attributes:
        names: the linears' names within the block, in the order of their calls.
        in_features: I, the width of the input.
        called: False for a linear that the probe run never called (an expert without tokens, a weight used directly).
    """

    names: tuple[str, ...]
    in_features: int
    called: bool = True


def find_linears(block: nn.Module) -> dict[str, nn.Linear]:
    """The linears of a block that are to be rounded, by name, in module order.

    Exactly torch.nn.Linear, since a subclass may compute something else; one that computes the same is a torch.nn.Linear in the
    skeleton. Those that `left_exact` names are not among them.
    """
    exact = left_exact(block)
    return {name: module for name, module in block.named_modules() if type(module) is nn.Linear and name not in exact}


def left_exact(block: nn.Module) -> dict[str, str]:
    """Linears of a block that are never rounded, by name -> why: routers, and those smaller than a tile of the trellis."""
    found = dict.fromkeys(_routers(block), "router of experts")
    for name, module in block.named_modules():
        if type(module) is nn.Linear and min(module.in_features, module.out_features) < TILE:
            found.setdefault(name, f"smaller than a tile: {module.out_features} x {module.in_features}")
    return found


def expert_place(block: nn.Module, name: str) -> str | None:
    """What a linear in an expert has in common with those of the other experts, as `mlp.experts.*.down_proj`.

    None for one in no expert. Experts are SeparateExperts, or a list in the block of modules that hold linears.
    """
    parts = name.split(".")
    for end in range(1, len(parts) - 1):
        owner = block.get_submodule(".".join(parts[:end]))
        if isinstance(owner, SeparateExperts | nn.ModuleList) and parts[end].isdigit():
            return ".".join([*parts[:end], "*", *parts[end + 1 :]])
    return None


def _routers(block: nn.Module) -> list[str]:
    """Linears beside experts, or alone in a module beside them, with one output for each expert."""
    found = []
    for path, module in block.named_modules():
        if not isinstance(module, SeparateExperts | nn.ModuleList) or len(experts := _experts(module)) < 2:
            continue
        parent, _, own = path.rpartition(".")
        for name, child in block.get_submodule(parent).named_children():
            linears = [(inner, each) for inner, each in child.named_modules() if type(each) is nn.Linear]
            if name != own and len(linears) == 1 and linears[0][1].out_features == len(experts):
                found.append(".".join(part for part in (parent, name, linears[0][0]) if part))
    return found


def _experts(module: nn.Module) -> list[nn.Module]:
    children = [child for name, child in module.named_children() if name.isdigit()]
    return [child for child in children if any(type(each) is nn.Linear for each in child.children())]


def unsupported(block: nn.Module) -> list[tuple[str, str]]:
    """The weights of a block that a walk over its linears would skip, so that they are never skipped in silence.

    Returns:
        (parameter name within the block, why with shape and share of the block's parameters) for each parameter of two or more
        dimensions that is not in a torch.nn.Linear: routers, short convolutions, experts fused in a way that is not known.
    """
    total = sum(parameter.numel() for parameter in block.parameters())
    found = []
    for path, module in block.named_modules():
        if type(module) is nn.Linear:
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.ndim >= 2:
                share = 100 * parameter.numel() / total
                why = f"{list(parameter.shape)} in {type(module).__name__}, not a torch.nn.Linear; {share:.1f} % of the block"
                found.append((f"{path}.{leaf}" if path else leaf, why))
    return found


def refuse_unsupported(skeleton: Skeleton) -> None:
    """Raise QtipError, naming them, where more of the blocks' weights than a router's would be left as they are."""
    total = found = 0
    first = ""
    for prefix, block in skeleton.blocks:
        sizes = {name: parameter.numel() for name, parameter in block.named_parameters()}
        total += sum(sizes.values())
        for name, why in unsupported(block):
            found += sizes[name]
            first = first or f"{prefix}.{name} ({why})"
    if found > LARGEST_UNSUPPORTED_SHARE * total:
        source, kind = skeleton.source, type(skeleton.model).__name__
        raise QtipError(
            f"{100 * found / total:.0f} % of the weights of {source.name} are not in linear layers of {kind}, such as {first}",
            "rounded are modules that compute as torch.nn.Linear does, and experts fused by the protocol of transformers 5",
        )


def input_groups(skeleton: Skeleton, index: int, one_input: BlockInput) -> list[InputGroup]:
    """Runs block `index` once and groups its linears by the identity of what they were called with.

    Args:
        skeleton: the model, with block `index` materialized.
        index: which block.
        one_input: any batch on its way to this block; capture one of a single row to make this cheap.

    Returns:
        Groups in the order of their first call, then the linears that were not called, one group each.
    """
    linears = find_linears(skeleton.blocks[index][1])
    seen: dict[str, list[tuple[Any, ...]]] = {}
    held: list[Tensor] = []  # keeps every input alive: freed memory given to the next would look like the same tensor

    def note(name: str, tensor: Tensor) -> None:
        held.append(tensor)
        # The version counts in-place writes, so memory that was overwritten between two calls is not the same input.
        identity = (tensor.data_ptr(), tensor._version, tensor.dtype, tuple(tensor.shape), tensor.stride())
        seen.setdefault(name, []).append(identity)

    with watched({name: linears[name] for name in linears}, note):
        run_block(skeleton, index, one_input)
    by_input: dict[tuple[Any, ...], list[str]] = {}
    for name, identities in seen.items():
        by_input.setdefault(tuple(identities), []).append(name)
    groups = [InputGroup(tuple(names), linears[names[0]].in_features) for names in by_input.values()]
    idle = [InputGroup((name,), linear.in_features, called=False) for name, linear in linears.items() if name not in seen]
    return _experts_together(skeleton.blocks[index][1], groups + idle)


def _experts_together(block: nn.Module, groups: Sequence[InputGroup]) -> list[InputGroup]:
    """All experts' groups at one place before those of the next place: none of them depends on another at its place.

    So the quantized prefix runs a block once for each place, not for each expert. Other groups keep their order.
    """
    place_of = {name: expert_place(block, name) for name in find_linears(block)}
    rank = {name: number for number, name in enumerate(place_of)}
    first: dict[str, int] = {}
    for name, place in place_of.items():
        if place is not None:
            first.setdefault(place, rank[name])
    layers: dict[str, list[InputGroup]] = {}
    ordered: list[InputGroup | str] = []
    for group in groups:
        place = place_of[group.names[0]]
        layer = None if place is None else place.partition(".*.")[0]
        if layer is None or layer not in layers:
            ordered.append(group if layer is None else layer)
        if layer is not None:
            layers.setdefault(layer, []).append(group)
    for members in layers.values():
        members.sort(key=lambda group: (first[place_of[group.names[0]] or ""], rank[group.names[0]]))
    return [group for each in ordered for group in (layers[each] if isinstance(each, str) else [each])]


class HessianRecorder:
    """Sums x x^T over everything that one linear of each group is called with, while it is entered as a context.

    The result does not depend on threads or device timing: chunks of at most 2,048 tokens are added in the order of the calls,
    in float32, on the device of the input.

    Args:
        block: a materialized block.
        groups: from `input_groups`.
        device: where sums are kept; None is where the linears' weights are.

    Attributes:
        sums: first name of each group -> sum of x x^T, float32 [I, I]. Sums of several processes may be added.
        tokens: first name of each group -> number of x summed.
    """

    def __init__(self, block: nn.Module, groups: Sequence[InputGroup], device: torch.device | None = None) -> None:
        self._watched = {group.names[0]: block.get_submodule(group.names[0]) for group in groups}
        self.sums: dict[str, Tensor] = {}
        for group in groups:
            where = device or self._watched[group.names[0]].weight.device
            self.sums[group.names[0]] = torch.zeros(group.in_features, group.in_features, device=where)
        self.tokens = dict.fromkeys(self.sums, 0)
        self._hooks: Any = None

    def __enter__(self) -> HessianRecorder:
        self._hooks = watched(self._watched, self._add)
        self._hooks.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._hooks.__exit__(kind, error, trace)

    def hessians(self) -> dict[str, tuple[Tensor, int]]:
        """First name of each group -> (proxy Hessian as of `mean_hessians`, the tokens it is the mean of)."""
        return {name: (mean, self.tokens[name]) for name, mean in mean_hessians(self.sums, self.tokens).items()}

    def _add(self, name: str, tensor: Tensor) -> None:
        x_NI = tensor.detach().reshape(-1, tensor.shape[-1])
        for chunk_NI in x_NI.split(CHUNK_TOKENS):
            chunk_NI = chunk_NI.to(torch.float32)
            self.sums[name].addmm_(chunk_NI.T, chunk_NI)
        self.tokens[name] += x_NI.shape[0]


def mean_hessians(sums: Mapping[str, Tensor], tokens: Mapping[str, int]) -> dict[str, Tensor]:
    """Proxy Hessians E[x x^T], float32 [I, I], from sums of x x^T and numbers of x by name; zeros where there is no x.

    The mean is as in QuIP#, arXiv 2402.04396, section 2.

    Raises:
        QtipError: an input was NaN or infinite, which no damping repairs.
    """
    means = {}
    for name, total in sums.items():
        if not torch.isfinite(total).all():
            hint = "the model overflows on this text: compute in float32, or leave out this text"
            raise QtipError(f"the input of {name} holds NaN or infinite values", hint)
        means[name] = total / max(tokens[name], 1)
    return means


class OutputRecorder:
    """Sums g g^T over the gradients g of the outputs of linears, while it is entered as a context.

    Chunks of at most 2,048 tokens are added in the order in which gradients arrive, in float32, on their device.

    Args:
        block: a materialized block.

    Attributes:
        sums: name of each linear that had a gradient -> sum of g g^T, float32 [O, O]. tokens: name -> number of g summed.
    """

    def __init__(self, block: nn.Module) -> None:
        self._linears = find_linears(block)
        self.sums: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> OutputRecorder:
        for name, linear in self._linears.items():

            def hook(_: nn.Module, args: Any, output: Tensor, name: str = name) -> None:
                if output.requires_grad:
                    output.register_hook(lambda gradient: self._add(name, gradient))

            self._handles.append(linear.register_forward_hook(hook))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()

    def _add(self, name: str, gradient: Tensor) -> None:
        g_NO = gradient.detach().reshape(-1, gradient.shape[-1])
        total = self.sums.get(name)
        if total is None:
            total = self.sums[name] = torch.zeros(g_NO.shape[1], g_NO.shape[1], device=g_NO.device)
        for chunk_NO in g_NO.split(CHUNK_TOKENS):
            chunk_NO = chunk_NO.to(torch.float32)
            total.addmm_(chunk_NO.T, chunk_NO)
        self.tokens[name] = self.tokens.get(name, 0) + len(g_NO)


@contextmanager
def watched(linears: dict[str, nn.Linear], note: Any) -> Iterator[None]:
    """Calls `note(name, input)` before each call of the given linears."""
    handles: list[RemovableHandle] = []
    try:
        for name, linear in linears.items():

            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
                note(name, args[0] if args else kwargs["input"])

            handles.append(linear.register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
