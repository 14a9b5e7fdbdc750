"""Owns which tensors of the checkpoint fill which parameter of the model, by transformers' own renaming and converting rules.

transformers loads a checkpoint through a list of renamings (old spellings, wrappers, a base model saved without its head) and
of conversions (experts fused into one tensor, rotary halves permuted). Both are followed one parameter at a time; only a
conversion of one tensor into several parameters is not.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from qtipcli.model.source import ModelSource


@dataclass(frozen=True)
class Conversion:
    """One parameter made of several tensors of the checkpoint, or of one that is changed on the way.

    converter: transformers' rule. parts: pattern of the rule -> the stored tensors that it matches, in transformers' order.
    """

    converter: WeightConverter
    parts: dict[str, list[str]]

    @property
    def stored_names(self) -> list[str]:
        return [name for names in self.parts.values() for name in names]


@dataclass(frozen=True)
class KeyMap:
    """How a checkpoint covers a model.

    Attributes:
        stored_name: name in the model -> name in the checkpoint, for what is stored as it is.
        converted: name in the model -> what it is made of, for all else.
        obstacle: why the checkpoint cannot be read tensor by tensor; empty where it can.
    """

    stored_name: dict[str, str]
    converted: dict[str, Conversion]
    obstacle: str = ""


def map_keys(model: nn.Module, source: ModelSource, tied: dict[str, str]) -> KeyMap:
    """Pairs the model's parameters and persistent buffers with the checkpoint's tensors.

    Args:
        model: the model, whose parameters may be on meta.
        source: the checkpoint.
        tied: names of parameters that are another parameter -> that parameter's name.

    Returns:
        The pairs; with an obstacle if one tensor is converted into several, or a parameter has no tensor of its shape. A
        persistent buffer that the checkpoint does not hold keeps the value it was built with.
    """
    wanted = model.state_dict(keep_vars=True)
    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = model.base_model_prefix
    stored_name: dict[str, str] = {}
    converted: dict[str, Conversion] = {}
    for stored in sorted(source.tensor_names, key=dot_natural_key):
        target, converted_by = rename_source_key(stored, renamings, converters, prefix, wanted)
        if target not in wanted and stored in wanted:  # an old rule caught a key that is already spelt the new way
            target, converted_by = stored, None
        if target not in wanted:
            continue  # the checkpoint may hold more than the model: rotary tables, heads for other tasks
        if converted_by is None:
            stored_name[target] = stored
            continue
        converter = converter_of[converted_by]
        if len(converter.target_patterns) > 1:
            return KeyMap({}, {}, f"transformers converts {stored} into several parameters while loading")
        conversion = converted.setdefault(target, Conversion(deepcopy(converter), {}))
        conversion.parts.setdefault(converted_by, []).append(stored)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    _share_tied(stored_name, tied)
    for name in parameters - converted.keys():
        if name not in stored_name:
            return KeyMap({}, {}, f"the checkpoint has no tensor named for {name}")
        found, needed = source.shape(stored_name[name]), tuple(wanted[name].shape)
        if found != needed:
            return KeyMap({}, {}, f"{stored_name[name]} is {list(found)} in the checkpoint, but {name} is {list(needed)}")
    return KeyMap(stored_name, converted)


def _share_tied(stored_name: dict[str, str], tied: dict[str, str]) -> None:
    """Lets each name of a tied pair be read from the other's tensor where the checkpoint holds only one."""
    for name, original in tied.items():
        if name in stored_name:
            stored_name.setdefault(original, stored_name[name])
        elif original in stored_name:
            stored_name[name] = stored_name[original]
