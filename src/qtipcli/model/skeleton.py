"""Owns the model as a module graph whose weights come and go: built on meta, one decoder block at a time made real.

The blocks are found from the graph alone; parameters outside them (embedding, final norm, a vision tower) come and go together,
and the head's never come: streaming needs no logits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from qtipcli.errors import CorruptError, QtipError, first_line
from qtipcli.model.keys import map_keys
from qtipcli.model.reading import Reader, Stored
from qtipcli.model.source import ModelSource, check_finite
from qtipcli.nn.plain import make_plain


class Skeleton:
    """A causal language model without its weights, and the means to fetch them block by block.

    Args:
        source: the opened checkpoint.
        dtype: of the weights as computed with (buffers and the few parameters that a model keeps in float32 stay so).
        device: where blocks are made real and run.
        prepare: called with the model on meta before its tensors are looked for in the checkpoint, to replace modules.

    Attributes:
        model: the transformers model in eval mode; parameters on meta, buffers real and on `device`. Fused experts and other
            modules that compute as linears do are torch.nn.Linears in it (qtipcli.nn.plain).
        blocks: (name, module) of every decoder block, in order; names as in `model.named_modules()`.
        outer_names: parameters outside the blocks, without the second name of tied ones.
        tied: second name of a tied parameter -> its first name, as lm_head.weight -> model.embed_tokens.weight.
        untied: names that the config ties, but whose tensors in the checkpoint differ; they are not in `tied`.
        notes: what a report must tell the user about how this model was read.

    Raises:
        QtipError: transformers cannot build the model, it has no list of blocks, or the checkpoint does not cover it.
    """

    def __init__(
        self,
        source: ModelSource,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        prepare: Callable[[PreTrainedModel], None] | None = None,
    ) -> None:
        self.source = source
        self.dtype = dtype
        self.device = torch.device(device)
        self.notes: list[str] = []
        self.model = _build_without_weights(source, dtype)
        if prepare is not None:
            prepare(self.model)
        _move_buffers(self.model, self.device)
        self.tied = _tied_names(self.model)
        keys = map_keys(self.model, source, self.tied)
        whole = self._load_whole() if keys.obstacle else None
        if keys.obstacle:
            self.notes.append(f"the whole model was loaded into memory, not streamed: {keys.obstacle}")
        self._reader = Reader(self._stored(), keys, self.model, whole)
        self._reader.origins = make_plain(self.model).origins
        self.blocks = find_blocks(self.model)
        inside = tuple(f"{name}." for name, _ in self.blocks)
        self.outer_names = [name for name, _ in self.model.named_parameters() if not name.startswith(inside)]
        self.untied: list[str] = []
        self._untie_what_differs()

    def read(self, name: str) -> Tensor:
        """A parameter or persistent buffer by its name in the model, on the CPU, in the checkpoint's dtype; do not write to it.

        Raises:
            KeyError: the model has no such tensor, or the checkpoint does not hold that buffer.
            CorruptError: the shard has changed since it was opened.
        """
        return self._reader.read(name)

    def materialize(self, index: int) -> nn.Module:
        """Loads block `index` afresh from the checkpoint, whatever was done to its weights before, and returns it.

        Raises:
            CorruptError: a weight is NaN or infinite (named, with the count), or its shard is damaged.
        """
        name, block = self.blocks[index]
        for owner, leaf, full_name in _own_tensors(block, name):
            self._make_real(owner, leaf, full_name)
        self._reader.forget()
        return block

    def release(self, index: int) -> None:
        """Puts every parameter of block `index` back to meta."""
        for owner in self.blocks[index][1].modules():
            _make_meta(owner)
        give_back_freed_memory()

    def materialize_outer(self, head: bool = False) -> None:
        """Loads everything outside the blocks that comes before the head: embeddings, final norm, a vision tower.

        head: load the head too, which a tied one shares with the embedding.

        Not on demand, although a run may not need all of it: models ask parameters for their device before using them, and
        torch answers a look-up of meta indices in a real table with uninitialized memory.

        Raises:
            CorruptError: as for `materialize`.
        """
        root = self.model if head else self.model.base_model
        names = {id(module): name for name, module in self.model.named_modules()}
        real: dict[str, nn.Parameter | None] = {}
        for owner in self._outer_modules(root):
            for _, leaf, full_name in _own_tensors(owner, names[id(owner)], recurse=False):
                original = real.get(self.tied.get(full_name, ""))
                if original is not None:
                    owner._parameters[leaf] = original
                    continue
                self._make_real(owner, leaf, full_name)
                real[full_name] = owner._parameters.get(leaf)

    def release_outer(self) -> None:
        """Puts every parameter outside the blocks back to meta."""
        for owner in self._outer_modules(self.model):
            _make_meta(owner)
        give_back_freed_memory()

    def _outer_modules(self, root: nn.Module) -> list[nn.Module]:
        inside = {id(owner) for _, block in self.blocks for owner in block.modules()}
        return [owner for owner in root.modules() if id(owner) not in inside]

    def _stored(self) -> Stored:
        """Where tensors are read from."""
        return self.source

    def _load_whole(self) -> dict[str, Tensor]:
        return _load_whole(self.source)

    def _untie_what_differs(self) -> None:
        """As transformers does: the config says tied, but the checkpoint holds two tensors that are not equal."""
        for name, original in list(self.tied.items()):
            if self._reader.is_same(name, original):
                continue
            if not torch.equal(self.read(name), self.read(original)):
                del self.tied[name]
                self.outer_names.append(name)
                self.untied += (name, original)
                self.notes.append(f"{name} and {original} are tied in the config but differ in the checkpoint: both are kept")

    def _make_real(self, owner: nn.Module, leaf: str, name: str) -> None:
        if leaf in owner._buffers and not self.holds(name):
            return  # a persistent buffer the checkpoint leaves out: what it was built with stands
        kind = owner._parameters if leaf in owner._parameters else owner._buffers
        # transformers loads each tensor in the dtype its module was built with, which need not be the model's.
        tensor = self.read(name).to(self.device, kind[leaf].dtype, copy=True)
        check_finite(name, tensor)
        kind[leaf] = nn.Parameter(tensor, requires_grad=False) if kind is owner._parameters else tensor

    def holds(self, name: str) -> bool:
        """Whether the checkpoint has this parameter or buffer, so that `read` finds it."""
        return self._reader.holds(name)


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The decoder blocks: the longest outermost list of modules with weight matrices, below the text decoder if it says which.

    Only lists that lie in no other list count, since a block may hold a list of experts longer than the model is deep. A wrong
    choice cannot pass unseen: `inputs.capture_first_inputs` checks that the blocks run once each, in order, each on what the
    one before returned.

    Raises:
        QtipError: there is no such list.
    """
    names = {id(module): name for name, module in model.named_modules()}
    root = model.get_decoder() if isinstance(model, PreTrainedModel) else model
    if id(root) not in names or not any(isinstance(each, nn.ModuleList) for each in root.modules()):
        root = model
    candidates = [each for each in _outermost_lists(root) if all(_has_matrix(member) for member in each)]
    if not candidates:
        hint = "only models built as a torch.nn.ModuleList of blocks can be streamed"
        raise QtipError(f"{type(model).__name__} has no list of decoder blocks", hint)
    best = max(candidates, key=lambda each: (len(each), sum(parameter.numel() for parameter in each.parameters())))
    return [(names[id(block)], block) for block in best]


def _outermost_lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    for child in module.children():
        if isinstance(child, nn.ModuleList) and len(child):
            yield child
        else:
            yield from _outermost_lists(child)


def _has_matrix(module: nn.Module) -> bool:
    return any(parameter.ndim >= 2 for parameter in module.parameters())


def _build_without_weights(source: ModelSource, dtype: torch.dtype) -> PreTrainedModel:
    """The model with parameters on meta and buffers computed, as rotary frequencies must be: no checkpoint holds them."""
    config = source.config
    config.use_cache = False  # blocks are run one at a time, on whole rows
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=source.trust_remote_code)
    # A config that somebody else wrote can make a model's class raise anything.
    except Exception as error:
        raise QtipError(
            f"transformers cannot build {source.name}: {first_line(error)}",
            "check its config.json; a newer transformers may help",
        ) from error
    model.tie_weights()  # each parameter became its own on the way to meta
    return model.eval()


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for leaf, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[leaf] = buffer.to(device)


def _tied_names(model: nn.Module) -> dict[str, str]:
    """Second name -> first name of every parameter that the model holds under two names."""
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        original = first.setdefault(id(parameter), name)
        if original != name:
            tied[name] = original
    return tied


def _own_tensors(module: nn.Module, prefix: str, recurse: bool = True) -> list[tuple[nn.Module, str, str]]:
    """(owner, attribute, full name) of the parameters and persistent buffers of a module."""
    found = []
    for path, owner in module.named_modules() if recurse else [("", module)]:
        stem = ".".join(part for part in (prefix, path) if part)
        persistent = [leaf for leaf in owner._buffers if leaf not in owner._non_persistent_buffers_set]
        leaves = [leaf for leaf, value in owner._parameters.items() if value is not None]
        leaves += [leaf for leaf in persistent if owner._buffers[leaf] is not None]
        found += [(owner, leaf, f"{stem}.{leaf}" if stem else leaf) for leaf in leaves]
    return found


def _make_meta(owner: nn.Module) -> None:
    for leaf, parameter in owner._parameters.items():
        if parameter is not None and not parameter.is_meta:
            owner._parameters[leaf] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)


def give_back_freed_memory() -> None:
    """Returns freed memory to the system, where the C library needs to be told.

    glibc serves tensors of up to 32 MiB from its heap, which streaming fragments: for 24 blocks of 64 MiB in float32 the peak
    was 966 MiB above the start without this, and 193 MiB with it.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
    if trim is not None:
        trim(0)


def _load_whole(source: ModelSource) -> dict[str, Tensor]:
    """Every tensor of the model as transformers loads it, on the CPU, in the widest float dtype of the checkpoint.

    Raises:
        QtipError: transformers cannot load it.
        CorruptError: parameters would have been left at random values.
    """
    floats = {source.dtype(name) for name in source.tensor_names if source.dtype(name).is_floating_point}
    widest = max(floats, key=lambda dtype: (dtype.itemsize, str(dtype)), default=torch.float32)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source.directory,
            dtype=widest,
            device_map="cpu",
            use_safetensors=True,
            trust_remote_code=source.trust_remote_code,
            output_loading_info=True,
        )
    except Exception as error:
        hint = "check that the model loads without qtip"
        raise QtipError(f"transformers cannot load {source.name}: {first_line(error)}", hint) from error
    if info["missing_keys"]:
        hint = "download or export the model again, with all of its parts"
        first, *more = sorted(info["missing_keys"])
        others = f" and {len(more)} more parameters" if more else ""
        raise CorruptError(f"the checkpoint of {source.name} has no weights for {first}{others}", hint)
    return dict(model.state_dict())
