"""Owns SeparateExperts: experts that transformers holds fused in one tensor, as linears of their own that compute the same.

Fused experts are known by the protocol of transformers 5 (integrations/moe.py, use_experts_implementation), not by their class:
what the decorator sets on a module, and parameters of the names and shapes that its kernels read.
Dimension key: N tokens, K experts a token, S = N * K, E experts, H features, I values inside an expert.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

DOWN = "down_proj"

PROTOCOL = ("num_experts", "has_gate", "has_bias", "is_transposed", "_apply_gate")
"""What use_experts_implementation and the classes under it put on a module, since transformers 5.10."""


def up_name(fused: nn.Module) -> str:
    """Name of the first of an expert's two projections."""
    return "gate_up_proj" if getattr(fused, "has_gate", True) else "up_proj"


def is_fused(module: nn.Module) -> bool:
    """Whether this is experts fused into tensors [E, out, in] (or [E, in, out]) that `SeparateExperts` can stand for."""
    return _is_routed(module) or _is_batched(module)


def is_transposed(fused: nn.Module) -> bool:
    """Whether the tensors of fused experts are [E, in, out]."""
    return bool(getattr(fused, "is_transposed", _is_batched(fused)))


class SeparateExperts(nn.Module):
    """Experts as linears: `0.gate_up_proj`, `0.down_proj`, `1.gate_up_proj` and on, up_proj where nothing gates.

    The forward pass is that of the fused module. A routed one is given hidden_states [N, H], top_k_index and top_k_weights
    [N, K], an index of E or more standing for no expert, and returns [N, H]. A batched one (Llama 4) is given hidden_states
    [E * N, H], scaled already, with zeros where an expert is not asked, and returns as much.

    fused: a module that `is_fused`. It lends its activation, gate and norm, and loses its weights to meta; what a model reads
    from it is read from here. The linears are on the device and of the dtype of its weights, and not filled.
    """

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        for name, child in fused.named_children():
            self.add_module(name, child)
        # In a tuple, so that it is no submodule: its parameters are not this module's.
        self._fused = (fused,)
        self._batched = _is_batched(fused)
        up = getattr(fused, up_name(fused))
        first, last = (2, 1) if is_transposed(fused) else (1, 2)
        placed = {"bias": bool(getattr(fused, "has_bias", False)), "device": up.device, "dtype": up.dtype}
        for expert in range(len(up)):
            linears = nn.Module()
            linears.add_module(up_name(fused), _linear(up.shape[last], up.shape[first], placed))
            down = getattr(fused, DOWN)
            linears.add_module(DOWN, _linear(down.shape[last], down.shape[first], placed))
            self.add_module(str(expert), linears)
        for name, parameter in fused.named_parameters(recurse=False):
            fused._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        self.train(fused.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_fused" not in self.__dict__ or name in self._fused[0]._parameters:
                raise
            return getattr(self._fused[0], name)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None) -> Tensor:
        if self._batched:
            return self._forward_batched(hidden_states)
        count = self._fused[0].num_experts
        chosen_S = top_k_index.reshape(-1).clamp(max=count)
        order_S = torch.argsort(chosen_S, stable=True)
        sizes = torch.bincount(chosen_S, minlength=count + 1).tolist()
        tokens = (order_S // top_k_index.shape[-1]).split(sizes)
        # A slot without an expert counts for nothing, but has its place among the others.
        parts = [self._expert(expert, hidden_states[rows]) for expert, rows in enumerate(tokens[:count]) if len(rows)]
        parts.append(hidden_states.new_zeros(sizes[count], parts[0].shape[-1] if parts else hidden_states.shape[-1]))
        out_SH = torch.cat(parts) * top_k_weights.reshape(-1)[order_S, None]
        if sizes[count]:
            out_SH = out_SH.masked_fill((chosen_S[order_S] == count)[:, None], 0)
        back_S = torch.empty_like(order_S)
        back_S[order_S] = torch.arange(len(order_S), device=order_S.device)
        return out_SH[back_S].view(*top_k_index.shape, -1).sum(1).to(hidden_states.dtype)

    def _forward_batched(self, hidden_states: Tensor) -> Tensor:
        rows_EN = hidden_states.view(self._fused[0].num_experts, -1, hidden_states.shape[-1])
        out_EN = torch.zeros_like(rows_EN)
        for expert, rows in enumerate(rows_EN):
            asked = rows.any(-1)  # without biases nothing comes of zeros
            if asked.any():
                out_EN[expert, asked] = self._expert(expert, rows[asked])
        return out_EN.view_as(hidden_states)

    def _expert(self, expert: int, x: Tensor) -> Tensor:
        fused, linears = self._fused[0], self._modules[str(expert)]
        inner = linears.get_submodule(up_name(fused))(x)
        if self._batched:
            gate, up = inner.chunk(2, dim=-1)
            inner = up * fused.act_fn(gate)
        else:
            inner = fused._apply_gate(inner) if fused.has_gate else fused.act_fn(inner)
        out = linears.get_submodule(DOWN)(inner)
        return self.post_expert_norm(out) if getattr(fused, "has_post_expert_norm", False) else out

    def joined(self) -> nn.Module:
        """The fused module with the weights that the linears have now, which must be plain and in memory."""
        fused = self._fused[0]
        for name in fused._parameters:
            part = "bias" if name.endswith("_bias") else "weight"
            linears = [
                self._modules[str(expert)].get_submodule(name.removesuffix("_bias")) for expert in range(fused.num_experts)
            ]
            tensors = [getattr(linear, part).detach() for linear in linears]
            turn = part == "weight" and is_transposed(fused)
            stacked = torch.stack([tensor.T if turn else tensor for tensor in tensors])
            fused._parameters[name] = nn.Parameter(stacked, requires_grad=tensors[0].requires_grad)
        return fused.train(self.training)


def _linear(inputs: int, outputs: int, placed: dict[str, Any]) -> nn.Linear:
    # Built on meta, so that no time goes into random weights.
    linear = nn.Linear(inputs, outputs, bias=placed["bias"], device="meta", dtype=placed["dtype"])
    return linear if placed["device"].type == "meta" else linear.to_empty(device=placed["device"])


def _is_routed(module: nn.Module) -> bool:
    if not all(hasattr(module, name) for name in PROTOCOL) or isinstance(module, SeparateExperts):
        return False
    names = {up_name(module), DOWN}
    if module.has_bias:
        names |= {f"{name}_bias" for name in names}
    return _has_exactly(module, names)


def _is_batched(module: nn.Module) -> bool:
    """As Llama 4's, the one kind of fused experts without the protocol: each expert is given rows for every token."""
    if hasattr(module, "has_gate") or isinstance(module, SeparateExperts):
        return False
    is_alike = callable(getattr(module, "act_fn", None)) and isinstance(getattr(module, "num_experts", None), int)
    if not is_alike or not _has_exactly(module, {"gate_up_proj", DOWN}):
        return False
    (experts, inputs, both), down = module.gate_up_proj.shape, tuple(module.down_proj.shape)
    return down == (experts, both // 2, inputs) and len(inspect.signature(module.forward).parameters) == 1


def _has_exactly(module: nn.Module, names: set[str]) -> bool:
    """Whether these are all its own parameters, one row or matrix for each expert: others would go into what it computes."""
    own = dict(module.named_parameters(recurse=False))
    sizes = {name: 2 if name.endswith("_bias") else 3 for name in names}
    return own.keys() == names and all(
        own[name].ndim == size and len(own[name]) == module.num_experts for name, size in sizes.items()
    )
