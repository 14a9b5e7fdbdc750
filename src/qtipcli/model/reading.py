"""Owns reading one parameter of the model from the checkpoint: under its name there, converted, or cut out of a fused tensor.

One expert of a fused tensor is converted as transformers converts all of them, but from that expert's tensors alone, so that
no more is in memory than what is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Protocol

import torch
from torch import Tensor, nn

from qtipcli.errors import CorruptError
from qtipcli.model.keys import Conversion, KeyMap
from qtipcli.nn.plain import Origin


class Stored(Protocol):
    """What tensors are read from: a ModelSource, or what stands for one."""

    def read(self, name: str, row: int | None = None) -> Tensor:
        """A tensor by its name in the checkpoint, or its row `row`."""
        ...


class Reader:
    """Reads a model's parameters and persistent buffers by their names in the streaming skeleton.

    Args:
        source: the checkpoint.
        keys: how it covers the model as transformers builds it.
        model: that model, before linears are put in the place of other modules; used for its config and shapes.
        whole: every tensor of that model, where the checkpoint could not be covered; None where it is streamed.
    """

    def __init__(self, source: Stored, keys: KeyMap, model: nn.Module, whole: dict[str, Tensor] | None) -> None:
        self._source, self._keys, self._model, self._whole = source, keys, model, whole
        self._shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()}
        self._last: tuple[str, Tensor] | None = None
        self.origins: Mapping[str, Origin] = {}

    def holds(self, name: str) -> bool:
        """Whether the checkpoint has this parameter or buffer."""
        original = self._origin(name).name
        if self._whole is not None:
            return original in self._whole
        return original in self._keys.stored_name or original in self._keys.converted

    def is_same(self, name: str, other: str) -> bool:
        """Whether both are read from one stored tensor, or were tied by transformers."""
        return self._whole is not None or self._keys.stored_name.get(name) == self._keys.stored_name.get(other)

    def read(self, name: str) -> Tensor:
        """On the CPU, in the checkpoint's dtype; do not write to it.

        Raises KeyError where there is no such tensor, CorruptError where what is stored does not make one of its shape.
        """
        origin = self._origin(name)
        tensor = self._read(origin.name) if origin.expert is None else self._read_expert(origin.name, origin.expert)
        return tensor.T.contiguous() if origin.transposed else tensor

    def _origin(self, name: str) -> Origin:
        return self.origins.get(name, Origin(name))

    def _read(self, name: str) -> Tensor:
        if self._whole is not None:
            return self._whole[name]
        conversion = self._keys.converted.get(name)
        if conversion is None:
            return self._source.read(self._keys.stored_name[name])
        tensor = self._convert(name, conversion)
        if tensor is None or tuple(tensor.shape) != self._shapes[name]:
            raise CorruptError(
                f"the tensors that transformers makes {name} of do not make one of {list(self._shapes[name])}: "
                f"{', '.join(conversion.stored_names[:2])} ...",
                "download or export the model again, with all of its parts",
            )
        return tensor

    def _read_expert(self, name: str, expert: int) -> Tensor:
        """Row or matrix `expert` of a fused tensor."""
        if self._whole is not None:
            return self._whole[name][expert]
        conversion = self._keys.converted.get(name)
        if conversion is None:
            return self._source.read(self._keys.stored_name[name], expert)
        shape = self._shapes[name]
        if all(len(names) == shape[0] for names in conversion.parts.values()):
            alone = self._convert(name, conversion, expert)
            if alone is not None and tuple(alone.shape) == (1, *shape[1:]):
                return alone[0]
        # A rule that mixes experts: they are converted together, and kept for the next that is asked for.
        if self._last is None or self._last[0] != name:
            self._last = (name, self._read(name))
        return self._last[1][expert]

    @torch.no_grad()
    def _convert(self, name: str, conversion: Conversion, expert: int | None = None) -> Tensor | None:
        converter = deepcopy(conversion.converter)
        for pattern, stored in conversion.parts.items():
            chosen = stored if expert is None else [stored[expert]]
            converter.collected_tensors[pattern] = [self._source.read(each) for each in chosen]
        try:
            made = converter.convert(name, model=self._model, config=self._model.config)
        except (ValueError, RuntimeError, KeyError, IndexError) as error:
            if expert is not None:
                return None
            raise CorruptError(
                f"transformers cannot make {name} of {', '.join(conversion.stored_names[:2])} ...: {error}",
                "download or export the model again, with all of its parts",
            ) from error
        tensor = made.get(name)
        return tensor[0] if isinstance(tensor, list) else tensor

    def forget(self) -> None:
        """Give back what is kept of a fused tensor."""
        self._last = None
