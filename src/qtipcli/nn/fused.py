"""Owns fusion: packed layers that share their input compute it in one go, one input transform and one product for all.

The first layer of a group that is called with a tensor computes for all of them; the others, called with the same tensor, take
their part. A model is loaded fused (qtipcli.hub.quantizer): on a GPU it is one launch for three; on two CPU cores one token's
q, k and v take 0.7 to 0.8 times as long, its gate and up 0.7 to 0.95 times, and those of a prompt about the same.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch._dynamo import mark_static_address

from qtipcli.nn.linear import TrellisLinear, packed_linear
from qtipcli.nn.swap import packed_layers

MISS_LIMIT = 8
"""Times in a row that a group computes parts which nobody takes, before it gives up: its layers do not share their input."""


def shared_inputs(model: nn.Module) -> list[tuple[str, ...]]:
    """Names of the packed layers that can be fused, group by group in the model's order.

    They have one parent and one device, are equal in in_features, trellis and transform_in, and hold the same scale_in and lut,
    bit for bit. Random signs are part of scale_in, so that equality proves that they were rounded for one and the same input.
    """
    groups: dict[tuple, list[list[str]]] = {}
    layers = {name: layer for name, layer in packed_layers(model).items() if not _immovable(layer)}
    for name, layer in layers.items():
        layout = layer.layout
        key = (name.rpartition(".")[0], layout.in_features, layout.spec, layout.transform_in, layer.trellis.device)
        alike = groups.setdefault(key, [])
        group = next((group for group in alike if same_input(layers[group[0]], layer)), None)
        if group is None:
            alike.append([name])
        else:
            group.append(name)
    return [tuple(group) for alike in groups.values() for group in alike if len(group) > 1]


def fuse(model: nn.Module) -> list[tuple[str, ...]]:
    """Fuse every group of `shared_inputs(model)`, in place, and return their names.

    The packed matrices of a group move into one tensor, of which each layer's `trellis` becomes a view, so that nothing is held
    twice and state_dict and save_pretrained see what they saw before. Layers fused earlier are fused anew.
    A group falls apart, for good and with every result right, when a layer's parameters are replaced or changed, state is
    loaded into it, or the layers turn out not to share their input. Copies and pickles of layers are not fused.
    """
    layers, groups = packed_layers(model), shared_inputs(model)
    _dissolve_all(layers.values())
    for names in groups:
        FusedGroup([layers[name] for name in names])
    return groups


def unfuse(model: nn.Module) -> None:
    """Undo `fuse`, in place: every layer computes for itself and has a `trellis` of its own again."""
    layers = packed_layers(model).values()
    _dissolve_all(layers)
    for layer in layers:
        if not _immovable(layer) and layer.trellis.untyped_storage().nbytes() != layer.trellis.nbytes:
            layer.trellis.data = layer.trellis.data.clone()


class FusedGroup:
    """Layers that compute together, and the parts that are computed but not yet taken. Made by `fuse`.

    Parts are found by the very tensor x, its version counter, thread and stream, so that neither a changed x nor another thread
    gets them, and they are dropped with x. Inference mode counts no versions, so that there each layer computes for itself; so
    it does where gradients are enabled, for autograd's graph to be that of separate layers. What remains is torch.no_grad.
    In a graph that torch.compile traces, a changed x cannot be told from the same: there, a model must not write into the input
    of its layers between calling them.
    """

    def __init__(self, layers: list[TrellisLinear]) -> None:
        self.layers = tuple(layers)
        self._pending: dict[int, _Parts] = {}
        self._misses = 0
        # In a trace there are neither threads nor weak references: what is pending begins and ends with the graph.
        self._traced_x: torch.Tensor | None = None
        self._traced_parts: dict[int, torch.Tensor] = {}
        self._shares_in_traces = True
        self._link()
        for slot, layer in enumerate(layers):
            layer.group, layer.slot = self, slot

    def part(self, layer: TrellisLinear, x: torch.Tensor) -> torch.Tensor | None:
        """What `layer` makes of x, or None where it must compute for itself."""
        slot = layer.slot
        # nn.DataParallel calls copies, which are on other devices than the layers here.
        if self.layers[slot] is not layer:
            return None
        if torch.compiler.is_compiling():
            return self._traced_part(slot, x)
        if not self._may_share(x):
            return None
        thread = threading.get_ident()
        part = self._take(thread, slot, x)
        if part is None:
            parts = dict(enumerate(packed_linear(x, self.layers, self.trellis)))
            part = parts.pop(slot)
            self._keep(thread, x, parts)
        return part

    def relink(self) -> None:
        """Join what a move of the layers to another device took apart; called after each of them has moved."""
        if len({layer.trellis.device for layer in self.layers}) > 1:
            return  # the last one to move calls again
        if not self._is_unchanged() or any(_immovable(layer) for layer in self.layers):
            self.dissolve()
        elif not self._is_linked():
            self._link()

    def dissolve(self) -> None:
        """From now on each layer computes for itself."""
        for layer in self.layers:
            if layer.group is self:
                layer.group = None
        self._pending.clear()

    def _link(self) -> None:
        with torch.inference_mode(False):
            self.trellis = torch.cat([layer.trellis.detach() for layer in self.layers])
            for layer, rows in zip(self.layers, self.trellis.split([len(layer.trellis) for layer in self.layers]), strict=True):
                layer.trellis.data = rows
        # As for parameters: without it, CUDA graphs that torch.compile makes would copy the tensor at every replay.
        mark_static_address(self.trellis)
        self._trellises = [(layer, layer.trellis, layer.trellis.data_ptr()) for layer in self.layers]
        self._read = [
            (layer, name, own, own._version)
            for layer in self.layers
            for name in ("scale_in", "lut")
            if (own := getattr(layer, name)) is not None
        ]

    def _is_linked(self) -> bool:
        return all(trellis.data_ptr() == address for _, trellis, address in self._trellises)

    def _is_unchanged(self) -> bool:
        """Whether the layers still have the parameters that they were compared by, with nothing written into them."""
        # Not by attributes, which nn.Module looks up ten times slower: this is done once for each layer and token.
        return self._has_its_trellises() and all(
            layer._parameters.get(name) is noted and noted._version == version for layer, name, noted, version in self._read
        )

    def _has_its_trellises(self) -> bool:
        return all(layer._parameters.get("trellis") is trellis for layer, trellis, _ in self._trellises)

    def _may_share(self, x: torch.Tensor) -> bool:
        if torch.is_grad_enabled() or torch.is_inference_mode_enabled() or x.is_inference():
            return False
        if self._misses >= MISS_LIMIT or not self._is_unchanged() or not self._is_linked():
            self.dissolve()
            return False
        return True

    def _take(self, thread: int, slot: int, x: torch.Tensor) -> torch.Tensor | None:
        pending = self._pending.get(thread)
        if pending is None or pending.x() is not x or pending.state != _state(x):
            return None
        part = pending.left.pop(slot, None)
        if not pending.left:
            self._pending.pop(thread, None)
            self._misses = 0
        return part

    def _keep(self, thread: int, x: torch.Tensor, parts: dict[int, torch.Tensor]) -> None:
        def drop(gone: weakref.ref) -> None:
            if (pending := self._pending.get(thread)) is not None and pending.x is gone:
                self._misses += 1
                self._pending.pop(thread, None)

        if thread in self._pending:
            self._misses += 1
        self._pending[thread] = _Parts(weakref.ref(x, drop), _state(x), parts)

    def _traced_part(self, slot: int, x: torch.Tensor) -> torch.Tensor | None:
        if torch.is_grad_enabled() or not self._shares_in_traces or not self._has_its_trellises():
            return None
        if self._traced_x is x and slot in self._traced_parts:
            part = self._traced_parts[slot]
            self._traced_parts = {other: kept for other, kept in self._traced_parts.items() if other != slot}
            if not self._traced_parts:
                self._traced_x = None
            return part
        if self._traced_x is not None:
            # Parts that nobody took: this graph computes them in vain, the next one will not.
            self._shares_in_traces, self._traced_x, self._traced_parts = False, None, {}
            return None
        parts = packed_linear(x, self.layers, self.trellis)
        self._traced_x = x
        self._traced_parts = {other: part for other, part in enumerate(parts) if other != slot}
        return parts[slot]


@dataclass(slots=True)
class _Parts:
    """Parts by their layer's slot, and the tensor that they were computed from, in the state that it had."""

    x: weakref.ref
    state: tuple[int, int]
    left: dict[int, torch.Tensor]


def _state(x: torch.Tensor) -> tuple[int, int]:
    """Changes when x is written into; and on a GPU with the stream, since another one would not wait for the product."""
    return x._version, torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0


def _dissolve_all(layers: Iterable[TrellisLinear]) -> None:
    for layer in layers:
        if layer.group is not None:
            layer.group.dissolve()


def _immovable(layer: TrellisLinear) -> bool:
    """Whether the weights are not in memory (offloaded), or count no versions (loaded in inference mode)."""
    read = (layer.trellis, layer.scale_in, layer.lut)
    return any(parameter is not None and (parameter.is_meta or parameter.is_inference()) for parameter in read)


def same_input(first: TrellisLinear, second: TrellisLinear) -> bool:
    """Whether two layers have the same input side, bit for bit, and the same code, so that one product serves both."""
    sides = ((layer.layout.in_features, layer.layout.spec, layer.layout.transform_in) for layer in (first, second))
    pairs = ((first.scale_in, second.scale_in), (first.lut, second.lut))
    return next(sides) == next(sides) and all(a is b or (a.dtype == b.dtype and torch.equal(a, b)) for a, b in pairs)
