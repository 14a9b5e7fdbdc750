"""Owns models of real size with random weights, packed or plain: what a speed needs, without download and quantizer."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from qtipcli.errors import QtipError
from qtipcli.hub.config import average_bits
from qtipcli.model.skeleton import find_blocks
from qtipcli.nn.fused import fuse
from qtipcli.nn.layout import PackedLayout
from qtipcli.nn.swap import packed_modules, swap
from qtipcli.quant.incoherence import random_signs
from qtipcli.quant.transform import Transform
from qtipcli_kernels.codes import default_lut
from qtipcli_kernels.spec import TrellisSpec

SEED = 1

SHARED_INPUTS = {"q_proj": "attention", "k_proj": "attention", "v_proj": "attention", "gate_proj": "mlp", "up_proj": "mlp"}
"""Layers of one input, by their names in most models: the quantizer gives them the same signs, and then they can be fused."""


def build(
    config: PreTrainedConfig,
    device: torch.device,
    dtype: torch.dtype,
    spec: TrellisSpec | None = None,
    transform: Transform | None = None,
) -> Any:
    """A model in eval mode; with `spec` every linear of its decoder blocks is packed, and they are fused as in a loaded model.

    Its activations stay of the size of one, as those of a trained model do. No packed layer is ever dense: memory never holds
    more than the finished model. Raises QtipError where transformers cannot build it.
    """
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (ValueError, KeyError, TypeError, AttributeError, ImportError, OSError) as error:
        fact = str(error).strip().split("\n")[0].rstrip(".")
        raise QtipError(f"transformers cannot build a {config.model_type} of this config: {fact}", "check it") from error
    model.tie_weights()  # each parameter became its own on the way to meta
    model.eval()
    if spec is not None:
        swap(model, layouts_of(model, spec, transform or Transform()))
    _fill(model, device, torch.Generator(device).manual_seed(SEED))
    fuse(model)
    return model


def layouts_of(model: nn.Module, spec: TrellisSpec, transform: Transform) -> dict[str, PackedLayout]:
    """A layout for every linear of the decoder blocks."""
    return {
        f"{prefix}.{name}": PackedLayout(
            linear.in_features, linear.out_features, spec, transform, transform, bias=linear.bias is not None
        )
        for prefix, block in find_blocks(model)
        for name, linear in block.named_modules()
        if type(linear) is nn.Linear
    }


def stored_bits(model: nn.Module) -> float:
    """Stored bits per weight of the packed layers; 0 where there is none."""
    return average_bits({name: module.layout for name, module in packed_modules(model).items()})


@torch.no_grad()
def _fill(model: nn.Module, device: torch.device, draw: torch.Generator) -> None:
    """Make every tensor real and random on `device`; tied ones once."""
    made: dict[int, nn.Parameter] = {}
    for name, module in model.named_modules():
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in made:
                tensor = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                _draw(tensor, module, leaf, name.rpartition(".")[2], draw)
                made[id(parameter)] = nn.Parameter(tensor, requires_grad=False)
            setattr(module, leaf, made[id(parameter)])
        for leaf, buffer in module.named_buffers(recurse=False):
            setattr(module, leaf, buffer.to(device))


def _draw(tensor: torch.Tensor, module: nn.Module, leaf: str, layer: str, draw: torch.Generator) -> None:
    if leaf == "trellis":  # any bits are a walk
        tensor.random_(-(2**31), 2**31 - 1, generator=draw)
    elif leaf == "lut":
        tensor.copy_(default_lut(module.layout.spec))
    elif leaf == "scale_in":
        tensor.copy_(random_signs(len(tensor), SEED, SHARED_INPUTS.get(layer, layer)))
    elif leaf == "scale_out":  # decoded weights have variance one
        tensor.random_(0, 2, generator=draw).mul_(2).sub_(1).mul_(module.in_features**-0.5)
    elif leaf == "bias":
        tensor.zero_()
    elif tensor.ndim == 1:  # a norm's weight
        tensor.fill_(1)
    else:
        tensor.normal_(0, 1 if isinstance(module, nn.Embedding) else tensor.shape[-1] ** -0.5, generator=draw)
