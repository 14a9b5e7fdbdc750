"""Owns the backward pass of calibration: the Hessian of every layer's outputs, from the text and one streamed pass back.

What each block is given is kept, in memory or in a file; then the loss goes back through one block after another. The loss is
that of tokens drawn from the model's own predictions, whose gradients' second moments are the Fisher matrix: the second order
of the KL divergence to the original.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qtipcli.errors import QtipError
from qtipcli.job.directory import RunDirectory
from qtipcli.job.processes import ALONE, Processes
from qtipcli.job.shared import SharedDirectory
from qtipcli.model.inputs import AfterBlocks, run_block, through_block
from qtipcli.model.linears import OutputRecorder, find_linears
from qtipcli.model.skeleton import Skeleton
from qtipcli.model.source import count_infinite
from qtipcli.quant.output_side import choose_damping
from qtipcli.stages import streams
from qtipcli.stages.progress import Watcher
from qtipcli.stages.slices import OrderedSums, Slices, cut, share_out
from qtipcli.stages.spread import least_loaded

MOST_TOKENS = 1 << 17
"""Of the calibration text that go back: what every block is given is kept for them, 4 bytes a value."""

MICRO_TOKENS = 4096
"""Tokens that go through a block with gradients at once."""

HELDOUT_SHARE = 8
"""One batch in this many decides how a layer's Hessian is damped, or that it is left out, before it is added to the others."""

LEAST_BATCHES = 16
"""Text that is shorter than a batch is cut into so many where it has the rows."""


def output_key(index: int) -> str:
    """The shard with the output Hessians of block `index`, float32 [O, O] by the layers' full names."""
    return f"outputs-{index:05d}"


def missing_blocks(job: RunDirectory, count: int) -> list[int]:
    """Blocks whose output Hessians are not there."""
    return [index for index in range(count) if not job.done(output_key(index))]


def run(
    skeleton: Skeleton,
    tokens: Tensor,
    slices: int,
    seed: int,
    job: SharedDirectory,
    watcher: Watcher,
    memory_gib: float,
    count: int | None = None,
    processes: Processes = ALONE,
) -> None:
    """Commit the output Hessians of every block to `job`, from the last to the first, going on where an earlier run stopped.

    tokens: int64 [rows, context]. slices: that sums are taken in. seed: of the drawn tokens. memory_gib: hidden states beyond
    this go to a file. count: of the first so many blocks only; the text goes through the others, too. processes: that share
    the rows. Raises QtipError where the model has no gradients.
    """
    missing = missing_blocks(job, len(skeleton.blocks) if count is None else count)
    if not missing:
        return
    rows = tokens[: max(1, MOST_TOKENS // tokens.shape[1])]
    if len(rows) < 2:
        raise QtipError("one window of text leaves none to judge with", "give longer text, or say --one-sided")
    if len(rows) < len(tokens):
        watcher.note(f"{len(rows)} of {len(tokens)} windows go back through the model")
    micro = max(1, min(MICRO_TOKENS // tokens.shape[1], len(rows) // LEAST_BATCHES))
    _Backward(skeleton, _share(rows.split(micro), slices, processes), seed, job, watcher, memory_gib).run(missing)


@dataclass(frozen=True)
class _Share:
    """What of the text goes back in this process: its batches, int64 [rows, context], and the number of each in the text.

    fitted, heldout: the slices of both parts of the text. row: [1, context], the first of all.
    """

    batches: list[Tensor]
    numbers: list[int]
    fitted: Slices
    heldout: Slices
    row: Tensor


def _share(batches: tuple[Tensor, ...], slices: int, processes: Processes) -> _Share:
    heldout = max(1, len(batches) // HELDOUT_SHARE)
    bounds = (0, len(batches) - heldout, len(batches))
    numbers: list[int] = []
    parts: list[Slices] = []
    for start, end in itertools.pairwise(bounds):
        units = [range(start + part.start, start + part.stop) for part in cut(end - start, slices)]
        mine, own = share_out(units, processes, before=len(numbers))
        numbers += mine
        parts.append(own)
    return _Share([batches[number] for number in numbers], numbers, *parts, batches[0][:1])


class _Backward:
    """One run."""

    def __init__(
        self, skeleton: Skeleton, share: _Share, seed: int, job: SharedDirectory, watcher: Watcher, memory_gib: float
    ) -> None:
        self.skeleton, self.share, self.seed, self.job, self.watcher = skeleton, share, seed, job, watcher
        self.processes, self.batches = share.fitted.processes, share.batches
        # The last stream is that of the last block's outputs, and then of gradients.
        names = [f"inputs-{index:05d}-{self.processes.rank}" for index in range(len(skeleton.blocks) + 1)]
        self.given, self.calls = streams.start(skeleton, self.batches, names, job.path, memory_gib, watcher)
        self.gradients = self.given[-1]

    def run(self, missing: list[int]) -> None:
        count = len(self.skeleton.blocks)
        self.watcher.begin("output side", 2 * count - missing[0])
        try:
            for index in range(count):
                self._forward(index)
                self.watcher.advance(self.skeleton.blocks[index][0])
            self._start_gradients()
            for index in reversed(range(missing[0], count)):
                self._backward(index, index in missing)
                self.watcher.advance(self.skeleton.blocks[index][0])
        finally:
            for stream in self.given:
                stream.close()

    def _forward(self, index: int) -> None:
        self.skeleton.materialize(index)
        for batch in range(len(self.batches)):
            self.processes.poll()
            output = run_block(self.skeleton, index, streams.batch_at(self.given[index], self.calls, batch))
            self.given[index + 1].write(batch, output)
        self.skeleton.release(index)

    def _start_gradients(self) -> None:
        """Of the loss with respect to what the last block returns."""
        self.skeleton.materialize_outer(head=True)
        after = AfterBlocks(self.skeleton, self.share.row)
        for batch, rows in enumerate(self.batches):
            self.processes.poll()
            hidden = self.gradients.read(batch).to(self.skeleton.device).requires_grad_(True)
            logits = after.logits(rows, hidden)
            gradient = drawn_gradient(logits.detach(), (self.seed << 20) + self.share.numbers[batch])
            self._put_back(batch, logits, hidden, gradient)
        self.skeleton.release_outer()

    def _put_back(self, batch: int, output: Tensor, hidden: Tensor, gradient: Tensor | None = None) -> None:
        if not output.requires_grad:
            name = type(self.skeleton.model).__name__
            raise QtipError(f"{name} computes without gradients", "calibrate with --one-sided")
        self.gradients.write(batch, torch.autograd.grad(output, hidden, gradient)[0])

    def _backward(self, index: int, is_missing: bool) -> None:
        """Through block `index`; its outputs are recorded if they are missing."""
        prefix, block = self.skeleton.blocks[index]
        self.skeleton.materialize(index)
        shapes = {name: (linear.out_features, linear.out_features) for name, linear in find_linears(block).items()}
        parts = []
        for slices in (self.share.fitted, self.share.heldout):
            parts.append(OrderedSums(slices, shapes, self.skeleton.device))
            for number, batches in slices.own.items():
                with OutputRecorder(block) as recorder:
                    for batch in batches:
                        self.processes.poll()
                        hidden = self.given[index].read(batch).to(self.skeleton.device, copy=True).requires_grad_(True)
                        # A block may write to what it gets, which a leaf that asks for a gradient forbids.
                        output = through_block(self.skeleton, index, hidden.clone(), self.calls[batch][index])
                        self._put_back(batch, output, hidden, self.gradients.read(batch).to(output))
                if is_missing:
                    parts[-1].add(number, recorder.sums, recorder.tokens)
                del recorder  # with the sums of its slice
        self.skeleton.release(index)
        if is_missing:
            self.job.commit(output_key(index), *self._outputs(f"{prefix}.", shapes, *parts))

    def _outputs(
        self, stem: str, shapes: Mapping[str, tuple[int, int]], fitted: OrderedSums, heldout: OrderedSums
    ) -> tuple[dict[str, Tensor], dict[str, object]]:
        """(full name -> E[g g^T]; the report: full name -> damping, None for none, and the held-out loss with it).

        Only what the first process returns counts. The layers are judged by the processes that have least to do. Their sums are
        used up, the largest last: what choosing a damping takes then stands beside the fewest of them.
        """
        names = list(shapes)
        tokens = [part.counts(names) for part in (fitted, heldout)]
        # Linears without a gradient, such as an expert that saw no token, have no sums.
        costs = {name: shapes[name][0] ** 3 for name in names}
        owners = least_loaded(costs, [0.0] * self.processes.world)
        sums = [part.deliver(owners) for part in (fitted, heldout)]
        judged: dict[str, dict[str, object]] = {}
        hessians: dict[str, Tensor] = {}
        for name in sorted(names, key=lambda name: (shapes[name][0], name)):
            if owners[name] != self.processes.rank or not (tokens[0][name] and tokens[1][name]):
                continue
            own = [part.pop(name) for part in sums]
            total = (own[0] + own[1]).div_(tokens[0][name] + tokens[1][name])
            if count_infinite(total):
                continue
            means = (own.pop(0).div_(tokens[0][name]), own.pop().div_(tokens[1][name]))
            damping, ratio = choose_damping(*means)
            del means
            hessians[f"{stem}{name}"] = total.cpu()
            judged[f"{stem}{name}"] = {"damping": None if damping == float("inf") else damping, "heldout_ratio": ratio}
        found = {
            name: (rank, report) for rank, part in enumerate(self.processes.collect(judged)) for name, report in part.items()
        }
        hessians = self._to_first(
            hessians, {name: (rank, shapes[name.removeprefix(stem)]) for name, (rank, _) in found.items()}
        )
        return dict(sorted(hessians.items())), {"layers": {name: found[name][1] for name in sorted(found)}}

    def _to_first(self, own: dict[str, Tensor], everywhere: Mapping[str, tuple[int, tuple[int, int]]]) -> dict[str, Tensor]:
        """The tensors of all processes in the first one. everywhere: name -> the process that has it, and its shape."""
        if not self.processes.is_main:
            for sent in [self.processes.send(tensor, 0) for tensor in own.values()]:
                sent.wait()
            return {}
        for name, (rank, shape) in everywhere.items():
            if rank:
                own[name] = torch.empty(shape)
                self.processes.receive(own[name], rank)
        return own


def drawn_gradient(logits: Tensor, seed: int) -> Tensor:
    """Gradient with respect to `logits` [..., V] of the sum of -log p of one token drawn from each prediction: p less 1 at it.

    Drawn where the cumulated probabilities pass a uniform number. In the shape and dtype of `logits`.
    """
    p_NV = torch.softmax(logits.flatten(0, -2).float(), -1)
    uniform_N = torch.rand(len(p_NV), 1, generator=torch.Generator().manual_seed(seed)).to(p_NV.device)
    cumulated_NV = p_NV.cumsum(-1)
    drawn_N = torch.searchsorted(cumulated_NV, uniform_N * cumulated_NV[:, -1:])
    p_NV.scatter_add_(1, drawn_N.clamp_(max=p_NV.shape[1] - 1), torch.full_like(p_NV[:, :1], -1.0))
    return p_NV.reshape(logits.shape).to(logits.dtype)
