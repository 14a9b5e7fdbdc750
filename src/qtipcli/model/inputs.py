"""Owns what flows between decoder blocks: the hidden states, and everything else that the model hands to each block.

No architecture is known here. The model itself prepares positions, rotary tables and masks (which may differ from block to
block, as with sliding windows): it is run with every block replaced by one that writes down its arguments. A run in which the
stand-ins return noise proves that the blocks form a plain chain, without which streaming them would be wrong.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from qtipcli.errors import QtipError
from qtipcli.model.skeleton import Skeleton

_HINT = "this architecture cannot be streamed block by block yet; please report it with the model's name"

# Tokens of the run that examines how the model treats its blocks: it keeps what each block gets, so it is short.
_PROBE_TOKENS = 32

# Distinct tensors of one shape and dtype that are looked through for an equal one: a model has a few kinds of masks and tables;
# beyond that they differ from row to row, and comparing each with all before it would take longer than the model.
_MOST_ALIKE = 8


@dataclass(frozen=True)
class BlockCall:
    """The arguments of one block besides its hidden states; tensors equal across blocks and batches are one object.

    Attributes:
        args: the positional ones after the hidden states.
        kwargs: the keyword ones.
        hidden_keyword: the keyword under which the block gets its hidden states; None where they come first by position.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden_keyword: str | None


@dataclass
class BlockInput:
    """One batch of rows on its way through the blocks.

    Attributes:
        hidden: hidden states, [rows, context, features] for most models; on the device where they are kept between blocks.
            Assign what `run_block` returns to go one block further.
        calls: for each block, its other arguments, on the skeleton's device.
    """

    hidden: Tensor
    calls: tuple[BlockCall, ...]


@torch.no_grad()
def capture_first_inputs(
    skeleton: Skeleton,
    token_rows: Tensor | Sequence[Tensor],
    batch_rows: int = 8,
    keep_on: torch.device | str = "cpu",
) -> list[BlockInput]:
    """What the first block gets for each batch of rows, and the other arguments of every block.

    Afterwards block 0 and everything outside the blocks are back on meta.

    Args:
        skeleton: the model.
        token_rows: token ids, int64 [rows, context]; every token counts (no padding). Or a batch each.
        batch_rows: rows in one batch; the last batch may be smaller.
        keep_on: the device that hidden states are kept on.

    Returns:
        One BlockInput a batch, in the order of the rows.

    Raises:
        QtipError: the blocks do not form a chain: one is skipped, repeated or reordered, or gets something that depends on
            another block other than the hidden states.
    """
    shared = _SharedTensors()
    inputs: list[BlockInput] = []
    batches = token_rows.split(batch_rows) if isinstance(token_rows, Tensor) else token_rows
    try:
        skeleton.materialize_outer()
        returns = _examine_chain(skeleton, batches[0][:1, :_PROBE_TOKENS])
        for rows in batches:
            recorder = _Recorder(skeleton, returns.wrap)
            recorder.run(rows)
            calls = tuple(shared.replace_in(call) for call in recorder.calls)
            inputs.append(BlockInput(recorder.hiddens[0].to(keep_on), calls))
    finally:
        skeleton.release(0)
        skeleton.release_outer()
    return inputs


@torch.no_grad()
def run_block(skeleton: Skeleton, index: int, one_input: BlockInput) -> Tensor:
    """The hidden states after block `index`, which must be materialized (its linears may have been changed or replaced).

    Args:
        skeleton: the model.
        index: which block.
        one_input: a batch whose `hidden` is what block `index` gets. It is not changed.

    Returns:
        Hidden states of the same shape, on the same device as `one_input.hidden`.
    """
    hidden = one_input.hidden.to(skeleton.device, copy=True)  # a block may write to what it gets
    return through_block(skeleton, index, hidden, one_input.calls[index]).to(one_input.hidden.device)


def through_block(skeleton: Skeleton, index: int, hidden: Tensor, call: BlockCall) -> Tensor:
    """As `run_block`, with gradients, on the skeleton's device; the block may write to `hidden`."""
    output = _call_block(skeleton.blocks[index][1], hidden, call)
    return output[0] if isinstance(output, tuple) else output


def _call_block(block: nn.Module, hidden: Tensor, call: BlockCall) -> Any:
    if call.hidden_keyword is None:
        return block(hidden, *call.args, **call.kwargs)
    return block(*call.args, **{call.hidden_keyword: hidden}, **call.kwargs)


@dataclass(frozen=True)
class _BlockReturns:
    """How the model's blocks return: the hidden states alone (rest is None), or a tuple of them and the rest."""

    rest: tuple[Any, ...] | None

    def wrap(self, hidden: Tensor) -> Tensor | tuple[Any, ...]:
        return hidden if self.rest is None else (hidden, *self.rest)


class AfterBlocks:
    """The model behind its last block: final norm and head, whatever the architecture puts there.

    The model itself is run, with blocks that pass on what they are given but for the last, which returns the hidden states that
    are asked about. Everything outside the blocks must be in memory; for `logits` the head too
    (`Skeleton.materialize_outer(head=True)`).
    """

    def __init__(self, skeleton: Skeleton, row: Tensor) -> None:
        """row: int64 [1, context], any tokens: the first block is run once on a few to learn how blocks return."""
        self._skeleton = skeleton
        self._returns = _learn_returns(skeleton, row[:, :_PROBE_TOKENS])

    def logits(self, rows: Tensor, hidden: Tensor) -> Tensor:
        """[rows, context, vocabulary] for token ids int64 [rows, context] and what the last block returns for them.

        They have a gradient where `hidden` asks for one.
        """
        return self._run(rows, hidden).logits

    @torch.no_grad()
    def call_head(self, rows: Tensor, hidden: Tensor, head: nn.Module) -> None:
        """As `logits`, but ends with the call of `head`: its pre-hooks see its input, its weights are not read.

        Raises:
            QtipError: the model never calls it.
        """

        def stop(*args: Any, **kwargs: Any) -> None:
            raise _Reached

        try:
            head.forward = stop
            self._run(rows, hidden)
        except _Reached:
            return
        finally:
            del head.forward
        raise _refusal(self._skeleton, "never calls its head")

    def _run(self, rows: Tensor, hidden: Tensor) -> Any:
        blocks = [block for _, block in self._skeleton.blocks]
        try:
            for block in blocks:
                block.forward = self._pass_on
            blocks[-1].forward = lambda *args, **kwargs: self._returns.wrap(hidden.to(self._skeleton.device, copy=True))
            return self._skeleton.model(input_ids=rows.to(self._skeleton.device), use_cache=False)
        finally:
            for block in blocks:
                del block.forward

    def _pass_on(self, *args: Any, **kwargs: Any) -> Any:
        block = self._skeleton.blocks[0][1]
        return self._returns.wrap(_take_hidden(block, args, kwargs)[1])


class _Reached(Exception):  # noqa: N818 - it says that a point was reached, not that something is wrong
    """Ends a run of the model at its first block."""


def _examine_chain(skeleton: Skeleton, row: Tensor) -> _BlockReturns:
    """Proves on one row that the blocks form a chain, and learns how they return.

    The model is run twice without its blocks: once they pass the hidden states on, once they return noise. Each block must get
    exactly the noise of the one before, and nothing else that a block gets may change with the noise.
    """
    returns = _learn_returns(skeleton, row)
    generator = torch.Generator().manual_seed(0)
    noises: list[Tensor] = []

    def noise_like(value: Any) -> Any:
        is_float = isinstance(value, Tensor) and value.is_floating_point()
        return torch.randn(value.shape, generator=generator).to(value) if is_float else value

    def answer_noise(hidden: Tensor) -> Tensor | tuple[Any, ...]:
        noises.append(noise_like(hidden))
        rest = None if returns.rest is None else tuple(noise_like(value) for value in returns.rest)
        return _BlockReturns(rest).wrap(noises[-1].clone())  # a copy: the model might write to it

    plain = _Recorder(skeleton, returns.wrap)
    plain.run(row)
    noisy = _Recorder(skeleton, answer_noise)
    noisy.run(row)
    for index, call in enumerate(noisy.calls):
        if index > 0 and _depends(noisy.hiddens[index], noises[index - 1]):
            raise _refusal(skeleton, f"changes the hidden states between blocks {index - 1} and {index}")
        if _depends(call.args, plain.calls[index].args) or _depends(call.kwargs, plain.calls[index].kwargs):
            raise _refusal(skeleton, f"hands block {index} something that depends on its blocks, besides the hidden states")
    return returns


def _learn_returns(skeleton: Skeleton, row: Tensor) -> _BlockReturns:
    """Runs the first block for real: what it returns cannot be known otherwise."""

    def stop(_: Tensor) -> None:
        raise _Reached

    recorder = _Recorder(skeleton, stop)
    with suppress(_Reached):
        recorder.run(row)
    output = _call_block(skeleton.materialize(0), recorder.hiddens[0], recorder.calls[0])
    skeleton.release(0)
    if isinstance(output, Tensor):
        return _BlockReturns(None)
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        return _BlockReturns(output[1:])
    raise _refusal(skeleton, f"has a block that returns {type(output).__name__}, not a tensor or a tuple that starts with one")


def _run_body(skeleton: Skeleton, rows: Tensor) -> None:
    """Runs the model up to its final norm; the head would cost the most and tell nothing."""
    try:
        skeleton.model.base_model(input_ids=rows.to(skeleton.device), use_cache=False)
    except (NotImplementedError, RuntimeError) as error:
        if "meta" not in str(error):
            raise
        raise _refusal(skeleton, "uses weights of its blocks outside of them") from error


class _Recorder:
    """Stands in for every block during one run of the model and writes down what each is given.

    Args:
        skeleton: the model.
        answer: hidden states that a block is given -> what it is to return.

    Attributes:
        hiddens: the hidden states that each block was given.
        calls: its other arguments.
    """

    def __init__(self, skeleton: Skeleton, answer: Callable[[Tensor], Any]) -> None:
        self.skeleton = skeleton
        self.answer = answer
        self.hiddens: list[Tensor] = []
        self.calls: list[BlockCall] = []

    def run(self, rows: Tensor) -> None:
        blocks = [block for _, block in self.skeleton.blocks]
        try:
            # On the instances, so that attributes which a model reads from its blocks stay where they are.
            for index, block in enumerate(blocks):
                block.forward = partial(self._record, index)
            _run_body(self.skeleton, rows)
        finally:
            for block in blocks:
                del block.forward
        if len(self.calls) != len(blocks):
            raise _refusal(self.skeleton, f"calls {len(self.calls)} of its {len(blocks)} blocks")

    def _record(self, index: int, *args: Any, **kwargs: Any) -> Any:
        if index != len(self.calls):
            fact = f"does not run its blocks once each in order: call {len(self.calls)} is of block {index}"
            raise _refusal(self.skeleton, fact)
        call, hidden = _take_hidden(self.skeleton.blocks[index][1], args, kwargs)
        self.hiddens.append(hidden)
        self.calls.append(call)
        return self.answer(hidden)


def _take_hidden(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[BlockCall, Tensor]:
    """Separates the hidden states, a block's first parameter, from its other arguments."""
    if args:
        return BlockCall(args[1:], dict(kwargs), None), args[0]
    keyword = list(inspect.signature(type(block).forward).parameters)[1]  # after self
    others = {name: value for name, value in kwargs.items() if name != keyword}
    return BlockCall((), others, keyword), kwargs[keyword]


def _depends(one: Any, other: Any) -> bool:
    """Whether tensors in two nests of tuples, lists and dicts differ, or state is carried from block to block in a cache."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.is_meta or not torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        one, other = tuple(one.values()), tuple(other.values())
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) != len(other) or any(_depends(*pair) for pair in zip(one, other, strict=True))
    return type(one) is not type(other) or isinstance(one, Cache)


def _refusal(skeleton: Skeleton, fact: str) -> QtipError:
    return QtipError(f"{type(skeleton.model).__name__} {fact}", _HINT)


class _SharedTensors:
    """One object for tensors of equal content: without it every batch would keep its own rotary tables and masks."""

    def __init__(self) -> None:
        self._kept: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}

    def replace_in(self, call: BlockCall) -> BlockCall:
        kwargs = {name: self._replace(value) for name, value in call.kwargs.items()}
        return BlockCall(tuple(self._replace(value) for value in call.args), kwargs, call.hidden_keyword)

    def _replace(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            alike = self._kept.setdefault((value.shape, value.dtype), [])
            for kept in alike:
                if kept is value or torch.equal(kept, value):
                    return kept
            if len(alike) < _MOST_ALIKE:
                alike.append(value)
            return value
        # A dict or list may be shared between blocks that write to it, so only tuples are rebuilt.
        return tuple(self._replace(each) for each in value) if type(value) is tuple else value
