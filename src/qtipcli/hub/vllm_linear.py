"""Owns packed layers under vLLM: which of vLLM's layers are packed, how their tensors are loaded, and what they compute.

vLLM merges layers of one input (q, k and v; gate and up) into one, loads each of ours into its part of it, and calls it once.
The parts are packed one by one, with rates of their own, so that each parameter of a merged layer is one flat tensor in which
the parts follow each other; what shares its input side is computed in one go, as in nn.fused.
Experimental: it has not run under vLLM yet.

Sources: vLLM's docs/design/plugin_system.md, and its layers/quantization/base_config.py and layers/linear.py (0.2x, 2026).
Dimension key: I inputs, O outputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from qtipcli.errors import CorruptError, QtipError
from qtipcli.hub.config import QtipConfig
from qtipcli.nn.fused import same_input
from qtipcli.nn.layout import PackedLayout
from qtipcli.nn.linear import TrellisLinear, packed_linear
from qtipcli.registration import METHOD

MERGED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""vLLM's usual names; a model that merges others says so itself (packed_modules_mapping)."""

QKV = {"q": 0, "k": 1, "v": 2}
"""What vLLM calls the parts of qkv_proj when it loads them; the parts of other merged layers are called by their numbers."""

TENSORS = {"trellis": torch.int32, "scale_in": torch.float16, "scale_out": torch.float16, "lut": torch.float16}
"""Parameters of a layer, by the names that they have on disk. Beside them `weight`, which is empty there and here."""

MIN_CAPABILITY = 80
"""Of NVIDIA GPUs that the Triton kernels run on: sm_80."""


class QtipVllmConfig(QuantizationConfig):
    """The quantization_config of config.json, as vLLM asks about it. layouts: module name -> layout of every packed layer."""

    def __init__(self, layouts: Mapping[str, PackedLayout]) -> None:
        super().__init__()
        self.layouts = dict(layouts)

    def __repr__(self) -> str:
        return f"QtipVllmConfig({len(self.layouts)} packed layers)"

    def get_name(self) -> str:
        """As in `quant_method`."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Those of the kernels."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """See MIN_CAPABILITY."""
        return MIN_CAPABILITY

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: all is in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QtipVllmConfig:
        """Read as strictly as elsewhere; raises QtipError naming what is unknown or missing."""
        return cls(QtipConfig.from_dict(dict(config)).layouts())

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename the layers as the model does that vLLM builds."""
        self.layouts = hf_to_vllm_mapper.apply_dict(self.layouts)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """How vLLM's `layer` called `prefix` computes; None leaves an embedding, or what is no linear, as it is.

        Raises QtipError for a packed embedding or head, and for a merged layer of which only some parts are packed.
        """
        names = self._parts_of(prefix)
        packed = [name for name in names if name in self.layouts]
        if not isinstance(layer, LinearBase):
            if packed:
                raise QtipError(
                    f"{prefix} is packed, which this vLLM plugin cannot load yet",
                    "quantize without --embedding-bits and --head-bits, or serve it with `qtip serve`",
                )
            return None
        if not packed:
            return UnquantizedLinearMethod()
        if len(packed) < len(names):
            missing = ", ".join(sorted(set(names) - set(packed)))
            raise QtipError(
                f"vLLM merges {', '.join(names)} into {prefix}, but {missing} is not packed",
                "quantize all of them or none, without --skip for single ones",
            )
        return QtipLinearMethod(prefix, [self.layouts[name] for name in names])

    def _parts_of(self, prefix: str) -> list[str]:
        """Names on disk of what vLLM calls `prefix`, in its order."""
        parent, dot, own = prefix.rpartition(".")
        parts = (self.packed_modules_mapping or {}).get(own) or MERGED.get(own) or (own,)
        # A model may call its own layer what others call a merged one.
        return [prefix] if prefix in self.layouts else [f"{parent}{dot}{part}" for part in parts]


class QtipLinearMethod(LinearMethodBase):
    """One layer of vLLM's, merged or not. layouts: of its parts, in the order of their outputs."""

    def __init__(self, prefix: str, layouts: Sequence[PackedLayout]) -> None:
        self.prefix = prefix
        # vLLM owns the bias, whole and in its own dtype, and hands it to `apply`.
        self.layouts = [dataclasses.replace(layout, bias=False) for layout in layouts]

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the parameters, unfilled. vLLM's own loader is not used: it cuts by rows and columns.

        Raises QtipError where the layer is cut by tensor parallelism, or its sizes are not those of config.json.
        """
        if getattr(layer, "tp_size", 1) > 1 or (input_size_per_partition, sum(output_partition_sizes)) != (
            input_size,
            output_size,
        ):
            raise QtipError(
                "packed layers cannot be cut by tensor parallelism",
                "start vLLM with --tensor-parallel-size 1; --pipeline-parallel-size spreads a model over GPUs",
            )
        found = [(output, input_size) for output in output_partition_sizes]
        stated = [(layout.out_features, layout.in_features) for layout in self.layouts]
        if found != stated:
            raise QtipError(f"{self.prefix} is {found} in vLLM, but {stated} in config.json", "check that they belong together")
        self.loaded: set[tuple[str, int]] = set()
        for name, dtype in TENSORS.items():
            sizes = self._sizes(name)
            if sum(sizes):
                layer.register_parameter(name, self._parameter(name, sizes, dtype))
        layer.register_parameter("weight", self._parameter("weight", [0] * len(self.layouts), params_dtype))

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Raise CorruptError where a tensor did not come; then join the parts that share their input."""
        for name in TENSORS:
            for part, size in enumerate(self._sizes(name)):
                if size and (name, part) not in self.loaded:
                    raise CorruptError(f"tensor {name} of part {part} of {self.prefix} was not loaded", "copy the model again")
        parts = [self._part(layer, number) for number in range(len(self.layouts))]
        # Out of nn.Module's sight: their parameters are views of the layer's own.
        layer.qtip_groups = tuple(
            _Group(tuple(run), self._slice(layer, "trellis", first, first + len(run)).view(-1, run[0].trellis.shape[1]))
            for first, run in _runs(parts)
        )

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x: [..., I]. Returns [..., sum of O] in x's dtype: what each part makes of x, one after the other."""
        y = torch.cat([part for group in layer.qtip_groups for part in packed_linear(x, group.parts, group.trellis)], dim=-1)
        return y if bias is None else y + bias

    def _sizes(self, name: str) -> list[int]:
        """Elements of this tensor in each part; 0 where a part has none."""
        tensors = [layout.tensors().get(name) for layout in self.layouts]
        return [0 if stored is None else torch.Size(stored.shape).numel() for stored in tensors]

    def _parameter(self, name: str, sizes: list[int], dtype: torch.dtype) -> nn.Parameter:
        parameter = nn.Parameter(torch.zeros(sum(sizes), dtype=dtype), requires_grad=False)

        def load(target: nn.Parameter, loaded: torch.Tensor, shard: str | int | None = None) -> None:
            part = QKV[shard] if isinstance(shard, str) else shard or 0
            stated = self.layouts[part].tensors().get(name)
            if stated is None or tuple(loaded.shape) != stated.shape:
                raise CorruptError(
                    f"tensor {name} of part {part} of {self.prefix} is {list(loaded.shape)}, not as config.json has it",
                    "copy the model again",
                )
            target.data[sum(sizes[:part]) : sum(sizes[: part + 1])].copy_(loaded.reshape(-1))
            self.loaded.add((name, part))

        parameter.weight_loader = load
        return parameter

    def _part(self, layer: nn.Module, number: int) -> TrellisLinear:
        """One part as a packed layer of its own, its parameters views of the merged ones."""
        part = TrellisLinear(self.layouts[number], device="meta", dtype=torch.float16)
        for name in TENSORS:
            if self._sizes(name)[number]:
                shape = self.layouts[number].tensors()[name].shape
                setattr(part, name, nn.Parameter(self._slice(layer, name, number, number + 1).view(shape), requires_grad=False))
        return part

    def _slice(self, layer: nn.Module, name: str, first: int, last: int) -> torch.Tensor:
        sizes = self._sizes(name)
        return getattr(layer, name).data[sum(sizes[:first]) : sum(sizes[:last])]


@dataclasses.dataclass(frozen=True)
class _Group:
    """Neighbouring parts that are computed together: `parts`, and `trellis`, their packed matrices one below the other."""

    parts: tuple[TrellisLinear, ...]
    trellis: torch.Tensor


def _runs(parts: list[TrellisLinear]) -> list[tuple[int, list[TrellisLinear]]]:
    """(number of the first, parts) of each run of neighbours that have the same input side, bit for bit."""
    runs: list[tuple[int, list[TrellisLinear]]] = []
    for number, part in enumerate(parts):
        if runs and same_input(runs[-1][1][0], part):
            runs[-1][1].append(part)
        else:
            runs.append((number, [part]))
    return runs
