"""Owns which tensor of the checkpoint fills which parameter of the model, by transformers' own renaming rules.

transformers loads a checkpoint through a list of renamings (old spellings, wrappers, a base model saved without its head) and
of conversions (experts fused into one tensor, rotary halves permuted). Renamings can be followed one tensor at a time;
conversions change values, so a checkpoint that needs one is not streamed.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from qtipcli.model.source import ModelSource


@dataclass(frozen=True)
class KeyMap:
    """How a checkpoint covers a model.

    Attributes:
        stored_name: name in the model -> name in the checkpoint.
        obstacle: why the checkpoint cannot be read tensor by tensor; empty where it can.
    """

    stored_name: dict[str, str]
    obstacle: str = ""


def map_keys(model: nn.Module, source: ModelSource, tied: dict[str, str]) -> KeyMap:
    """Pairs the model's parameters and persistent buffers with the checkpoint's tensors.

    Args:
        model: the model, whose parameters may be on meta.
        source: the checkpoint.
        tied: names of parameters that are another parameter -> that parameter's name.

    Returns:
        The pairs; with an obstacle if a value would have to be converted, or a parameter has no tensor of its shape. A
        persistent buffer that the checkpoint does not hold keeps the value it was built with.
    """
    wanted = model.state_dict(keep_vars=True)
    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    prefix = model.base_model_prefix
    stored_name: dict[str, str] = {}
    for stored in source.tensor_names:
        target, converted_by = rename_source_key(stored, renamings, converters, prefix, wanted)
        if target not in wanted and stored in wanted:  # an old rule caught a key that is already spelt the new way
            target, converted_by = stored, None
        if target not in wanted:
            continue  # the checkpoint may hold more than the model: rotary tables, heads for other tasks
        if converted_by is not None:
            return KeyMap({}, f"transformers converts {stored} while loading")
        stored_name[target] = stored
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    _share_tied(stored_name, tied)
    for name in parameters:
        if name not in stored_name:
            return KeyMap({}, f"the checkpoint has no tensor named for {name}")
        found, needed = source.shape(stored_name[name]), tuple(wanted[name].shape)
        if found != needed:
            return KeyMap({}, f"{stored_name[name]} is {list(found)} in the checkpoint, but {name} is {list(needed)}")
    return KeyMap(stored_name)


def _share_tied(stored_name: dict[str, str], tied: dict[str, str]) -> None:
    """Lets each name of a tied pair be read from the other's tensor where the checkpoint holds only one."""
    for name, original in tied.items():
        if name in stored_name:
            stored_name.setdefault(original, stored_name[name])
        elif original in stored_name:
            stored_name[name] = stored_name[original]
