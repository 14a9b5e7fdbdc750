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
from qtipcli.model.inputs import BlockCall, BlockInput, capture_first_inputs, run_block
from qtipcli.model.linears import CHUNK_TOKENS
from qtipcli.model.places import OUTPUT, PROBE_TOKENS, Place, find_places, look, signature
from qtipcli.model.skeleton import Skeleton
from qtipcli.model.source import count_infinite
from qtipcli.quant.correction import Evidence
from qtipcli.stages import streams
from qtipcli.stages.few_tokens import Moments, Peers, Shared, peers_of
from qtipcli.stages.slices import OrderedSums, Slices
from qtipcli.tune.activations import Activations

HELDOUT_SHARE = 8
"""One row of text in this many decides whether a correction made of the others helps."""


_ALL, _HELDOUT = _PARTS = ("all", "held out")
_HESSIAN, _CHANGE = "x x", "change x"  # no names of layers


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
    takes more than `memory_gib` GiB. slices: how the text is cut; None is one slice of all batches.
    heldout: for each batch bool [tokens], those that decide about corrections; None is those of every eighth row.

    Of several processes each has the batches of its own slices. All call each method, and all get the same.
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
        slices: Slices | None = None,
        heldout: Sequence[Tensor] | None = None,
    ) -> None:
        self._slices = slices or Slices.whole(len(quantized))
        self._processes = self._slices.processes
        self._skeleton, self._original, self._quantized, self._calls = skeleton, original, quantized, calls
        self._directory, self._memory_gib = directory, memory_gib
        self._probe: BlockInput = capture_first_inputs(skeleton, row[:, :PROBE_TOKENS], 1)[0]
        self._found: dict[object, dict[str, Place]] = {}
        self._heldout = heldout or _heldout_tokens([tuple(shape[:2]) for shape in quantized.shapes])
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
            self._processes.poll()
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
        places = sorted(set(group.places.values()))
        shapes = _Sums(block, group, torch.device("meta")).shapes()
        total = OrderedSums(self._slices, shapes, self._skeleton.device)
        with _replaced(block, prefix, rounded):
            for number, batches in self._slices.own.items():
                sums = _Sums(block, group, self._skeleton.device)
                for batch in batches:
                    self._add(sums, index, group, places, batch)
                total.add(number, sums.tensors, sums.tokens)
                del sums  # those of its slice
        tokens = total.counts([_ALL, _HELDOUT])
        found = total.everywhere()
        _refuse_infinite(names[0], _is_finite(found))
        return _moments_of(found, tokens, group, block, f"{prefix}.")

    def _add(self, sums: _Sums, index: int, group: _Group, places: Sequence[str], batch: int) -> None:
        """What one batch adds."""
        one_input = streams.batch_at(self._quantized, self._calls, batch)
        given, behind = look(self._skeleton, index, one_input, [group.first], places, once=group.is_compared)
        inputs = given[group.first]
        if not group.is_compared:
            sums.add_inputs(inputs)
            return
        missing = {place: self._before(place, batch) - behind[place] for place in places}
        changed = self._before(_input_key(group.first), batch) - inputs[0] if group.own else None
        sums.add(inputs[0], changed, missing, self._heldout[batch].to(self._skeleton.device))

    def _expert_moments(self, index: int, name: str, rounded: Mapping[str, Tensor]) -> Moments:
        """Of the group of an expert whose first layer is called `name`.

        One run of the block serves all experts at its place, or as many as have room, since none depends on another.
        """
        if name not in self._waiting:
            peers = self._peers.at(self._peers.place(name) or "")
            features = self._skeleton.model.get_submodule(name).in_features
            copies = 1 if self._slices.count == 1 else 2  # the running total, and the sum of a slice
            room = max(1, int(self._memory_gib * 2**30 // (copies * features**2 * torch.float32.itemsize)))
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
        device = self._skeleton.device
        # The sum over the others has a place of its own, under no name.
        total = OrderedSums(self._slices, dict.fromkeys(("", *chosen), (features, features)), device)
        with _replaced(block, prefix, rounded):
            for number, batches in self._slices.own.items():
                sums = {name: torch.zeros(features, features, device=device) for name in ("", *chosen)}
                tokens = dict.fromkeys(sums, 0)
                for batch in batches:
                    one_input = streams.batch_at(self._quantized, self._calls, batch)
                    given, _ = look(self._skeleton, index, one_input, list(short), [], once=False)
                    for name, inputs in given.items():
                        key = short[name] if short[name] in sums else ""
                        for x_NI in inputs:
                            _add(sums[key], x_NI, x_NI)
                            tokens[key] += len(x_NI)
                total.add(number, sums, tokens)
                del sums
        tokens, sums = total.counts(["", *chosen]), total.everywhere()
        count = sum(tokens.values())
        shared_II = torch.zeros_like(sums[""])
        for name, summed in sums.items():
            _refuse_infinite(name or peers[0], bool(torch.isfinite(summed).all()))
            shared_II += summed / max(count, 1)
        shared = Shared(shared_II, count)
        return {name: Moments(sums[name], tokens[name], shared=shared) for name in chosen}

    def advance(self, index: int, rounded: Mapping[str, Tensor]) -> None:
        """Take both streams through block `index`, which is materialized, whether it was entered or not."""
        prefix, block = self._skeleton.blocks[index]
        for batch in range(len(self._quantized)):
            self._processes.poll()
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
                None if in_memory else temporary_path(self._directory / f"kept-{number}-{self._processes.rank}"),
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
    """Over tokens of one slice, of what is missing behind the layers of one group.

    tensors: by name, each for all tokens (_ALL) and for those held out. tokens: how many there were of both.
    """

    def __init__(self, block: nn.Module, group: _Group, device: torch.device) -> None:
        self._group = group
        size = block.get_submodule(group.first).in_features
        rows = {_HESSIAN: size} | ({_CHANGE: size} if group.own else {})
        rows |= {name: block.get_submodule(name).out_features for name in group.places}
        self.tensors = {
            f"{part} {name}": torch.zeros(count, size, device=device) for name, count in rows.items() for part in _PARTS
        }
        self.tokens = dict.fromkeys(_PARTS, 0)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the tensors."""
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def add_inputs(self, inputs: Sequence[Tensor]) -> None:
        """Of streams that are not compared."""
        for x_NI in inputs:
            _add(self.tensors[f"{_ALL} {_HESSIAN}"], x_NI, x_NI)
            self.tokens[_ALL] += len(x_NI)

    def add(self, x_NI: Tensor, changed_NI: Tensor | None, missing: Mapping[str, Tensor], kept_N: Tensor) -> None:
        """changed_NI: the original's input less this one. missing: by place. kept_N: which tokens are held out."""
        for part, chosen in ((_ALL, slice(None)), (_HELDOUT, kept_N)):
            x = x_NI[chosen]
            self.tokens[part] += len(x)
            _add(self.tensors[f"{part} {_HESSIAN}"], x, x)
            if changed_NI is not None:
                _add(self.tensors[f"{part} {_CHANGE}"], changed_NI[chosen], x)
            for name, place in self._group.places.items():
                _add(self.tensors[f"{part} {name}"], missing[place][chosen], x)


def _is_finite(sums: Mapping[str, Tensor]) -> bool:
    """Also what follows from sums of the held-out tokens, which are fewer."""
    return all(not count_infinite(total) for name, total in sums.items() if name.startswith(f"{_ALL} "))


def _moments_of(sums: Mapping[str, Tensor], tokens: Mapping[str, int], group: _Group, block: nn.Module, stem: str) -> Moments:
    """sums, tokens: of `_Sums`, over all text. stem: in front of the names of the block's layers."""

    def missing(name: str, part: str) -> Tensor:
        # Behind a layer to whose output nothing is added W (x - x^) is missing.
        if name in group.own:
            return block.get_submodule(name).weight.float() @ sums[f"{part} {_CHANGE}"]
        return sums[f"{part} {name}"]

    found: dict[str, tuple[Evidence, Evidence]] = {}
    for name in (*group.own, *group.places):
        seen, heldout = (Evidence(sums[f"{part} {_HESSIAN}"], missing(name, part), tokens[part]) for part in _PARTS)
        found[f"{stem}{name}"] = (seen, heldout)
    return Moments(sums[f"{_ALL} {_HESSIAN}"], tokens[_ALL], found)


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
