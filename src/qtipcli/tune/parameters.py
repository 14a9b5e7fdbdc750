"""Owns which parameters are trained, at what rate each, which layers share one, and what becomes of them on disk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qtipcli.nn.linear import TrellisLinear
from qtipcli.tune.linear import TunedLinear

STORED_DTYPE = torch.float16
"""Of scales and tables on disk (docs/format.md, section 3)."""

SMALLEST_SIZE = 1e-3
"""What counts as the size of a parameter that is smaller or zero, such as biases at their start: its rate is a share of it."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Learning rates, each as a share of the parameter's own mean magnitude: scale_out is a hundredth of scale_in in size.

    scales: of scale_in and scale_out. norms: of norms and biases. luts: of the codes' tables. matrices: of the plain matrices
    that are named. 0 leaves those as they are.
    """

    scales: float
    norms: float
    luts: float
    matrices: float = 0.0


class Trained:
    """The float32 masters of everything that is trained in a module, under the names they are stored by.

    Args:
        module: holds TunedLinear or unfrozen TrellisLinear layers, and plain modules whose vectors (norms, biases) are trained
            too. Layers of one parent whose scale_in is equal, bit for bit, get one parameter: engines fuse
            them by that equality.
        prefix: what stands before the names of the module's parameters; "" for a whole model.
        dtypes: stored name -> dtype on disk, for norms, biases and plain matrices; those that are not in it are not trained.

    Attributes:
        masters: name -> the parameter; of those that share one, the first name.
        names: every stored name -> the name of its master.
        rates: name of a master -> its learning rate, absolute.
    """

    def __init__(self, module: nn.Module, prefix: str, dtypes: Mapping[str, torch.dtype], rates: Rates) -> None:
        self.masters: dict[str, nn.Parameter] = {}
        self.names: dict[str, str] = {}
        self.rates: dict[str, float] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        stem = f"{prefix}." if prefix else ""
        module.requires_grad_(False)
        for path, owner in module.named_modules():
            name = f"{stem}{path}" if path else prefix
            if isinstance(owner, TunedLinear | TrellisLinear):
                self._add_layer(name, owner, rates)
            else:
                for leaf, parameter in list(owner.named_parameters(recurse=False)):
                    full = f"{name}.{leaf}"
                    if full in dtypes:
                        rate = rates.norms if parameter.ndim == 1 else rates.matrices
                        self._add(full, _as_master(module, owner, leaf), dtypes[full], rate)
            if isinstance(owner, TunedLinear | TrellisLinear) and owner.bias is not None and f"{name}.bias" in dtypes:
                self._add(f"{name}.bias", owner.bias, dtypes[f"{name}.bias"], rates.norms)

    def _add_layer(self, name: str, layer: TunedLinear | TrellisLinear, rates: Rates) -> None:
        parent = name.rpartition(".")[0]
        for known, master in self.masters.items():
            same_side = known.endswith(".scale_in") and known.removesuffix(".scale_in").rpartition(".")[0] == parent
            if same_side and master.shape == layer.scale_in.shape and torch.equal(master, layer.scale_in):
                layer.scale_in = master
                self.names[f"{name}.scale_in"] = known
                break
        else:
            self._add(f"{name}.scale_in", layer.scale_in, STORED_DTYPE, rates.scales)
        self._add(f"{name}.scale_out", layer.scale_out, STORED_DTYPE, rates.scales)
        if layer.lut is not None:
            self._add(f"{name}.lut", layer.lut, STORED_DTYPE, rates.luts)

    def _add(self, name: str, parameter: nn.Parameter, dtype: torch.dtype, rate: float) -> None:
        if rate <= 0:
            return
        parameter.requires_grad_(True)
        self.masters[name] = parameter
        self.names[name] = name
        self._dtypes[name] = dtype
        self.rates[name] = rate * max(float(parameter.detach().abs().mean()), SMALLEST_SIZE)

    def stored(self) -> dict[str, Tensor]:
        """Every trained tensor as it goes to disk, rounded to its dtype there; shared ones under each of their names."""
        rounded = {name: master.detach().to(self._dtypes[name], copy=True).cpu() for name, master in self.masters.items()}
        return {name: rounded[master] for name, master in self.names.items()}

    @torch.no_grad()
    def load(self, stored: Mapping[str, Tensor]) -> None:
        """Set the masters to tensors that `stored` returned, or to those of another state under the same names."""
        for name, master in self.masters.items():
            master.copy_(stored[name])

    @contextlib.contextmanager
    def rounded(self) -> Iterator[None]:
        """Inside, the module computes with what would be stored; afterwards the masters are as they were, to the bit."""
        kept = {name: master.detach().clone() for name, master in self.masters.items()}
        self.load(self.stored())
        try:
            yield
        finally:
            self.load(kept)


def _as_master(module: nn.Module, owner: nn.Module, leaf: str) -> nn.Parameter:
    """The parameter `leaf` of `owner`, replaced by a float32 copy wherever `module` holds it: a tied head shares it."""
    original = getattr(owner, leaf)
    master = nn.Parameter(original.detach().float().clone())
    for each in module.modules():
        for name, parameter in each._parameters.items():
            if parameter is original:
                each._parameters[name] = master
    return master
