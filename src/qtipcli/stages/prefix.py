"""Owns the two streams of the quantized prefix: what the original blocks make of the text, and what the rounded ones do.

Layers are rounded in the order in which they are called. The original runs through a block once; what its layers are given and
what stands behind them is kept. For each group of layers with one input the other stream then runs through the block as it
stands, its rounded layers in place, to learn what the group is given now and what is missing behind it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from qtipcli.errors import QtipError
from qtipcli.job.files import temporary_path
from qtipcli.job.interrupt import checkpoint
from qtipcli.model.inputs import BlockCall, BlockInput, capture_first_inputs, run_block
from qtipcli.model.linears import CHUNK_TOKENS
from qtipcli.model.places import OUTPUT, PROBE_TOKENS, Place, find_places, look, signature
from qtipcli.model.skeleton import Skeleton
from qtipcli.model.source import count_infinite
from qtipcli.quant.correction import Evidence
from qtipcli.stages import streams
from qtipcli.stages.few_tokens import Moments, Peers, Shared, peers_of
from qtipcli.tune.activations import Activations

HELDOUT_SHARE = 8
"""One row of text in this many decides whether a correction made of the others helps."""


@dataclass(frozen=True)
class _Group:
    """Layers of a block with one input, by their names in it. first: whose input is looked at.

    own: those to whose output nothing is added. places: of the others. Both empty where the streams cannot be compared.
    """

    first: str
    own: tuple[str, ...]
    places: Mapping[str, str]

    @property
    def is_compared(self) -> bool:
        return bool(self.own or self.places)


class Prefix:
    """Both streams in front of one block after another.

    original, quantized: hidden states of each batch. calls: the other arguments of each batch's blocks.
    row: int64 [1, context], any tokens: a few of them probe the blocks. directory: where what is kept of a block goes that
    takes more than `memory_gib` GiB.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        original: Activations,
        quantized: Activations,
        calls: Sequence[tuple[BlockCall, ...]],
        row: Tensor,
        directory: Path,
        memory_gib: float = streams.DEFAULT_MEMORY_GIB,
    ) -> None:
        self._skeleton, self._original, self._quantized, self._calls = skeleton, original, quantized, calls
        self._directory, self._memory_gib = directory, memory_gib
        self._probe: BlockInput = capture_first_inputs(skeleton, row[:, :PROBE_TOKENS], 1)[0]
        self._found: dict[object, dict[str, Place]] = {}
        self._heldout = _heldout_tokens([tuple(shape[:2]) for shape in quantized.shapes])
        self._kept: dict[str, Activations] = {}
        self._peers = Peers({}, {})
        self._waiting: dict[str, Moments] = {}

    def enter(self, index: int, groups: Sequence[Sequence[str]]) -> None:
        """Run the original through block `index`, which is materialized, and keep what its layers are compared with.

        groups: full names of layers with one input each, of which `moments` is to be asked.
        """
        self._forget()
        self._peers = peers_of(groups, *self._skeleton.blocks[index])
        compared = [group for group in (self._group(index, names) for names in groups) if group.is_compared]
        inputs = [group.first for group in compared if group.own]
        places = sorted({place for group in compared for place in group.places.values()} | {OUTPUT})
        for batch in range(len(self._original)):
            checkpoint()
            one_input = streams.batch_at(self._original, self._calls, batch)
            given, behind = look(self._skeleton, index, one_input, inputs, places)
            seen = {_input_key(name): tensors[0] for name, tensors in given.items()} | behind
            if not self._kept:
                self._kept = self._streams({key: (tensor.shape[-1], tensor.dtype) for key, tensor in seen.items()})
            for key, tensor in seen.items():
                self._kept[key].write(batch, tensor)

    def sums_changes(self, index: int, names: Sequence[str]) -> bool:
        """Whether `moments` of these layers also sums what has changed of their input: a second pair of sums of its square."""
        return bool(self._group(index, names).own)

    def moments(self, index: int, names: Sequence[str], rounded: Mapping[str, Tensor]) -> Moments:
        """Of layers of block `index`, the last one entered, that share one input.

        names: full names. rounded: full name -> dense matrix [O, I] of the layers of the block that are rounded so far.
        Raises QtipError where a value is not finite.
        """
        prefix, block = self._skeleton.blocks[index]
        if self._peers.place(names[0]) is not None:
            return self._expert_moments(index, names[0], rounded)
        group = self._group(index, names)
        sums = _Sums(block, group, self._skeleton.device)
        places = sorted(set(group.places.values()))
        with _replaced(block, prefix, rounded):
            for batch in range(len(self._quantized)):
                one_input = streams.batch_at(self._quantized, self._calls, batch)
                given, behind = look(self._skeleton, index, one_input, [group.first], places, once=group.is_compared)
                inputs = given[group.first]
                if not group.is_compared:
                    sums.add_inputs(inputs)
                    continue
                missing = {place: self._before(place, batch) - behind[place] for place in places}
                changed = self._before(_input_key(group.first), batch) - inputs[0] if group.own else None
                sums.add(inputs[0], changed, missing, self._heldout[batch].to(self._skeleton.device))
        _refuse_infinite(names[0], sums.is_finite())
        return sums.moments(f"{prefix}.")

    def _expert_moments(self, index: int, name: str, rounded: Mapping[str, Tensor]) -> Moments:
        """Of the group of an expert whose first layer is called `name`.

        One run of the block serves all experts at its place, or as many as have room, since none depends on another.
        """
        if name not in self._waiting:
            peers = self._peers.at(self._peers.place(name) or "")
            features = self._skeleton.model.get_submodule(name).in_features
            room = max(1, int(self._memory_gib * 2**30 // (features**2 * torch.float32.itemsize)))
            first = peers.index(name)
            self._waiting = self._look_at_experts(index, peers, peers[first : first + room], rounded)
        return self._waiting.pop(name)

    def _look_at_experts(
        self, index: int, peers: Sequence[str], chosen: Sequence[str], rounded: Mapping[str, Tensor]
    ) -> dict[str, Moments]:
        """Of the `chosen` ones of `peers`; their shared Hessian is that of all."""
        prefix, block = self._skeleton.blocks[index]
        short = {peer.removeprefix(f"{prefix}."): peer for peer in peers}
        features = self._skeleton.model.get_submodule(peers[0]).in_features
        # The sum over the others has a place of its own, under no name.
        sums = {name: torch.zeros(features, features, device=self._skeleton.device) for name in ("", *chosen)}
        tokens = dict.fromkeys(sums, 0)
        with _replaced(block, prefix, rounded):
            for batch in range(len(self._quantized)):
                one_input = streams.batch_at(self._quantized, self._calls, batch)
                given, _ = look(self._skeleton, index, one_input, list(short), [], once=False)
                for name, inputs in given.items():
                    key = short[name] if short[name] in sums else ""
                    for x_NI in inputs:
                        _add(sums[key], x_NI, x_NI)
                        tokens[key] += len(x_NI)
        total = sum(tokens.values())
        shared_II = torch.zeros_like(sums[""])
        for name, summed in sums.items():
            _refuse_infinite(name or peers[0], bool(torch.isfinite(summed).all()))
            shared_II += summed / max(total, 1)
        shared = Shared(shared_II, total)
        return {name: Moments(sums[name], tokens[name], shared=shared) for name in chosen}

    def advance(self, index: int, rounded: Mapping[str, Tensor]) -> None:
        """Take both streams through block `index`, which is materialized, whether it was entered or not."""
        prefix, block = self._skeleton.blocks[index]
        for batch in range(len(self._quantized)):
            checkpoint()
            if self._kept:
                output = self._kept[OUTPUT].read(batch)
                self._original.write(batch, output.reshape(self._original.shapes[batch]))
            else:
                self._forward(index, self._original, batch)
            with _replaced(block, prefix, rounded):
                self._forward(index, self._quantized, batch)
        self._forget()

    @property
    def kept_bytes(self) -> int:
        """What is kept of the block that was entered last, in memory or in files."""
        return sum(torch.Size(shape).numel() * kept.dtype.itemsize for kept in self._kept.values() for shape in kept.shapes)

    def close(self) -> None:
        """Give files back."""
        for stream in (self._original, self._quantized):
            stream.close()
        self._forget()

    def _forget(self) -> None:
        for stream in self._kept.values():
            stream.close()
        self._kept, self._waiting = {}, {}

    def _before(self, key: str, batch: int) -> Tensor:
        """What the original had there."""
        return self._kept[key].read(batch).to(self._skeleton.device)

    def _streams(self, widths: Mapping[str, tuple[int, torch.dtype]]) -> dict[str, Activations]:
        """Room for one tensor [tokens, width] of each batch and key."""
        tokens = [shape[0] * shape[1] for shape in self._quantized.shapes]
        size = sum(tokens) * sum(width * dtype.itemsize for width, dtype in widths.values())
        in_memory = size <= self._memory_gib * 2**30
        return {
            key: Activations(
                [(count, width) for count in tokens],
                dtype,
                None if in_memory else temporary_path(self._directory / f"original-{number}"),
            )
            for number, (key, (width, dtype)) in enumerate(widths.items())
        }

    def _forward(self, index: int, stream: Activations, batch: int) -> None:
        stream.write(batch, run_block(self._skeleton, index, streams.batch_at(stream, self._calls, batch)))

    def _group(self, index: int, names: Sequence[str]) -> _Group:
        prefix, block = self._skeleton.blocks[index]
        kind = signature(block)
        if kind not in self._found:
            self._found[kind] = find_places(self._skeleton, index, self._probe)
        short = [name.removeprefix(f"{prefix}.") for name in names]
        found = {name: self._found[kind][name] for name in short if name in self._found[kind]}
        own = tuple(name for name, place in found.items() if place is None)
        return _Group(short[0], own, {name: place for name, place in found.items() if place is not None})


class _Sums:
    """Over tokens, of what is missing behind the layers of one group."""

    def __init__(self, block: nn.Module, group: _Group, device: torch.device) -> None:
        self._group = group
        self._weights = {name: block.get_submodule(name).weight for name in group.own}
        size = block.get_submodule(group.first).in_features
        rows = {name: block.get_submodule(name).out_features for name in group.places}
        self._tokens, self._heldout_tokens = 0, 0
        # Each for all tokens, and for those held out.
        self._hessians = [torch.zeros(size, size, device=device) for _ in range(2)]
        self._changes = [torch.zeros(size, size, device=device) for _ in range(2)] if group.own else []
        self._missing = [{name: torch.zeros(count, size, device=device) for name, count in rows.items()} for _ in range(2)]

    def add_inputs(self, inputs: Sequence[Tensor]) -> None:
        """Of streams that are not compared."""
        for x_NI in inputs:
            _add(self._hessians[0], x_NI, x_NI)
            self._tokens += len(x_NI)

    def add(self, x_NI: Tensor, changed_NI: Tensor | None, missing: Mapping[str, Tensor], kept_N: Tensor) -> None:
        """changed_NI: the original's input less this one. missing: by place. kept_N: which tokens are held out."""
        self._tokens += len(x_NI)
        self._heldout_tokens += int(kept_N.sum())
        for part, chosen in enumerate((slice(None), kept_N)):
            x = x_NI[chosen]
            _add(self._hessians[part], x, x)
            if changed_NI is not None:
                _add(self._changes[part], changed_NI[chosen], x)
            for name, place in self._group.places.items():
                _add(self._missing[part][name], missing[place][chosen], x)

    def is_finite(self) -> bool:
        """Also what follows from sums of one part, which are of fewer tokens."""
        totals = (self._hessians[0], *self._changes[:1], *self._missing[0].values())
        return all(not count_infinite(total) for total in totals)

    def moments(self, stem: str) -> Moments:
        """stem: in front of the names of the block's layers."""
        counts = (self._tokens, self._heldout_tokens)
        found: dict[str, tuple[Evidence, Evidence]] = {}
        for name in (*self._group.own, *self._group.places):
            seen, heldout = (
                Evidence(self._hessians[part], self._missing_behind(name, part), counts[part]) for part in range(2)
            )
            found[f"{stem}{name}"] = (seen, heldout)
        return Moments(self._hessians[0], self._tokens, found)

    def _missing_behind(self, name: str, part: int) -> Tensor:
        # Behind a layer to whose output nothing is added W (x - x^) is missing.
        return self._weights[name].float() @ self._changes[part] if name in self._weights else self._missing[part][name]


def _refuse_infinite(name: str, is_finite: bool) -> None:
    if not is_finite:
        raise QtipError(
            f"layer {name} is given NaN or infinite values",
            "the model overflows on this text: leave out this text, or quantize with --original-prefix",
        )


def _input_key(name: str) -> str:
    """Not the name of a place."""
    return f"input of {name}"


def _heldout_tokens(shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """For batches of these [rows, context], which of their tokens are held out: those of every eighth row, or of the last."""
    count = sum(rows for rows, _ in shapes)
    share = min(HELDOUT_SHARE, count)
    held = torch.arange(count) % share == share - 1 if count > 1 else torch.zeros(count, dtype=torch.bool)
    parts = held.split([rows for rows, _ in shapes])
    return [part.repeat_interleave(context) for part, (_, context) in zip(parts, shapes, strict=True)]


def _add(sum_JI: Tensor, y_NJ: Tensor, x_NI: Tensor) -> None:
    """sum += y^T x, in chunks that fix the order of the sum."""
    for y, x in zip(y_NJ.split(CHUNK_TOKENS), x_NI.split(CHUNK_TOKENS), strict=True):
        sum_JI.addmm_(y.T.to(torch.float32), x.to(torch.float32))


@contextlib.contextmanager
def _replaced(block: nn.Module, prefix: str, matrices: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, these layers of the block have these weights."""
    own = {name: block.get_submodule(name.removeprefix(f"{prefix}.")).weight for name in matrices}
    kept = {name: weight.data for name, weight in own.items()}
    for name, matrix_OI in matrices.items():
        own[name].data = matrix_OI
    try:
        yield
    finally:
        for name, tensor in kept.items():
            own[name].data = tensor
