"""Stands for the parts of vLLM that the plugin touches, as vLLM documents them: signatures and order of calls, nothing else.

Written from vLLM's docs/design/plugin_system.md and the docstrings of QuantizationConfig and LinearMethodBase.
"""

import sys
import types
from abc import ABC, abstractmethod

import torch
from torch import nn

STACKED = (
    ("qkv_proj", "q_proj", "q"),
    ("qkv_proj", "k_proj", "k"),
    ("qkv_proj", "v_proj", "v"),
    ("gate_up_proj", "gate_proj", 0),
    ("gate_up_proj", "up_proj", 1),
)
"""Merged layer, its part, what the part is called when it is loaded."""

METHODS: list[str] = []
REGISTERED: dict[str, type] = {}


class QuantizationConfig(ABC):
    def __init__(self):
        self.packed_modules_mapping = {}

    @abstractmethod
    def get_name(self): ...
    @abstractmethod
    def get_supported_act_dtypes(self): ...
    @classmethod
    @abstractmethod
    def get_min_capability(cls): ...
    @staticmethod
    @abstractmethod
    def get_config_filenames(): ...
    @classmethod
    @abstractmethod
    def from_config(cls, config): ...
    @abstractmethod
    def get_quant_method(self, layer, prefix): ...


class LinearMethodBase(ABC):
    @abstractmethod
    def create_weights(
        self,
        layer,
        input_size_per_partition,
        output_partition_sizes,
        input_size,
        output_size,
        params_dtype,
        **extra_weight_attrs,
    ): ...
    @abstractmethod
    def apply(self, layer, x, bias=None): ...
    def process_weights_after_loading(self, layer):  # noqa: B027, as in vLLM
        ...


class UnquantizedLinearMethod(LinearMethodBase):
    def create_weights(self, layer, input_size_per_partition, output_partition_sizes, *sizes_and_dtype, **extra): ...
    def apply(self, layer, x, bias=None): ...


class LinearBase(nn.Module):
    """A merged or single linear of vLLM's. output_sizes: of its parts; cut by `tp_size` along its outputs, or its inputs."""

    def __init__(self, input_size, output_sizes, quant_config, prefix, bias=False, tp_size=1, cut_inputs=False):
        super().__init__()
        self.tp_size = tp_size
        self.quant_method = quant_config.get_quant_method(self, prefix=prefix)
        outputs = output_sizes if cut_inputs else [size // tp_size for size in output_sizes]
        self.quant_method.create_weights(
            layer=self,
            input_size_per_partition=input_size // tp_size if cut_inputs else input_size,
            output_partition_sizes=outputs,
            input_size=input_size,
            output_size=sum(output_sizes),
            params_dtype=torch.float32,
            weight_loader=self.weight_loader,
        )
        self.bias = nn.Parameter(torch.zeros(sum(outputs)), requires_grad=False) if bias else None
        self.starts = [sum(outputs[:part]) for part in range(len(outputs) + 1)]
        if bias:
            self.bias.weight_loader = self.weight_loader

    def weight_loader(self, parameter, loaded, shard=None):
        part = {"q": 0, "k": 1, "v": 2}.get(shard, shard or 0)
        parameter.data[self.starts[part] : self.starts[part + 1]] = loaded

    def forward(self, x):
        return self.quant_method.apply(self, x, self.bias)


class VocabParallelEmbedding(nn.Module): ...


def load(layers, tensors):
    """What a model of vLLM's does with a checkpoint. layers: prefix -> LinearBase. tensors: name on disk -> tensor."""
    parameters = {f"{prefix}.{name}": own for prefix, layer in layers.items() for name, own in layer.named_parameters()}
    for name, tensor in tensors.items():
        for merged, part, shard in STACKED:
            if f".{part}." in name:
                parameter = parameters[name.replace(part, merged)]
                parameter.weight_loader(parameter, tensor, shard)
                break
        else:
            parameters[name].weight_loader(parameters[name], tensor)
    for layer in layers.values():
        layer.quant_method.process_weights_after_loading(layer)


def register_quantization_config(name):
    def register(config):
        assert name not in METHODS
        assert issubclass(config, QuantizationConfig)
        METHODS.append(name)
        REGISTERED[name] = config
        return config

    return register


def install(monkeypatch):
    """Put the stub in the place of vllm."""
    METHODS.clear()
    contents = {
        "vllm": {},
        "vllm.model_executor": {},
        "vllm.model_executor.layers": {},
        "vllm.model_executor.layers.linear": {
            each.__name__: each for each in (LinearBase, LinearMethodBase, UnquantizedLinearMethod)
        },
        "vllm.model_executor.layers.quantization": {
            "QUANTIZATION_METHODS": METHODS,
            "register_quantization_config": register_quantization_config,
        },
        "vllm.model_executor.layers.quantization.base_config": {"QuantizationConfig": QuantizationConfig},
    }
    for name, content in contents.items():
        module = types.ModuleType(name)
        vars(module).update(content, __path__=[])
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "qtipcli.hub.vllm_linear", raising=False)
