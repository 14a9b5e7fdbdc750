"""Owns the backward pass of calibration: the Hessian of every layer's outputs, from the text and one streamed pass back.

What each block is given is kept, in memory or in a file; then the loss goes back through one block after another. The loss is
that of tokens drawn from the model's own predictions, whose gradients' second moments are the Fisher matrix: the second order
of the KL divergence to the original.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qtipcli.errors import QtipError
from qtipcli.job.directory import RunDirectory
from qtipcli.job.interrupt import checkpoint
from qtipcli.model.inputs import AfterBlocks, run_block, through_block
from qtipcli.model.linears import OutputRecorder
from qtipcli.model.skeleton import Skeleton
from qtipcli.model.source import count_infinite
from qtipcli.quant.output_side import choose_damping
from qtipcli.stages import streams
from qtipcli.stages.progress import Watcher

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
    seed: int,
    job: RunDirectory,
    watcher: Watcher,
    memory_gib: float,
    count: int | None = None,
) -> None:
    """Commit the output Hessians of every block to `job`, from the last to the first, going on where an earlier run stopped.

    tokens: int64 [rows, context]. seed: of the drawn tokens. memory_gib: hidden states beyond this go to a file.
    count: of the first so many blocks only; the text goes through the others, too.
    Raises QtipError where the model has no gradients.
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
    _Backward(skeleton, rows.split(micro), seed, job, watcher, memory_gib).run(missing)


class _Backward:
    """One run."""

    def __init__(
        self, skeleton: Skeleton, batches: Sequence[Tensor], seed: int, job: RunDirectory, watcher: Watcher, memory_gib: float
    ) -> None:
        self.skeleton, self.batches, self.seed, self.job, self.watcher = skeleton, batches, seed, job, watcher
        # The last stream is that of the last block's outputs, and then of gradients.
        names = [f"inputs-{index:05d}" for index in range(len(skeleton.blocks) + 1)]
        self.given, self.calls = streams.start(skeleton, batches, names, job.path, memory_gib, watcher)
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
            checkpoint()
            output = run_block(self.skeleton, index, streams.batch_at(self.given[index], self.calls, batch))
            self.given[index + 1].write(batch, output)
        self.skeleton.release(index)

    def _start_gradients(self) -> None:
        """Of the loss with respect to what the last block returns."""
        self.skeleton.materialize_outer(head=True)
        after = AfterBlocks(self.skeleton, self.batches[0][:1])
        for batch, rows in enumerate(self.batches):
            checkpoint()
            hidden = self.gradients.read(batch).to(self.skeleton.device).requires_grad_(True)
            logits = after.logits(rows, hidden)
            self._put_back(batch, logits, hidden, drawn_gradient(logits.detach(), (self.seed << 20) + batch))
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
        heldout = max(1, len(self.batches) // HELDOUT_SHARE)
        parts = [range(len(self.batches) - heldout), range(len(self.batches) - heldout, len(self.batches))]
        recorders = [OutputRecorder(block) for _ in parts]
        for part, recorder in zip(parts, recorders, strict=True):
            with recorder:
                for batch in part:
                    checkpoint()
                    hidden = self.given[index].read(batch).to(self.skeleton.device, copy=True).requires_grad_(True)
                    # A block may write to what it gets, which a leaf that asks for a gradient forbids.
                    output = through_block(self.skeleton, index, hidden.clone(), self.calls[batch][index])
                    self._put_back(batch, output, hidden, self.gradients.read(batch).to(output))
        self.skeleton.release(index)
        if is_missing:
            self.job.commit(output_key(index), *_outputs(prefix, *recorders))


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


def _outputs(prefix: str, fitted: OutputRecorder, heldout: OutputRecorder) -> tuple[dict[str, Tensor], dict[str, object]]:
    """(full name -> E[g g^T]; the report: full name -> damping, None for none, and the held-out loss with it).

    The recorders' sums are used up, the largest last: what choosing a damping takes then stands beside the fewest of them.
    """
    hessians: dict[str, Tensor] = {}
    layers: dict[str, object] = {}
    names = sorted(fitted.sums.keys() & heldout.sums.keys(), key=lambda name: (len(fitted.sums[name]), name))
    for name in names:
        parts = [recorder.sums.pop(name) for recorder in (fitted, heldout)]
        tokens = [recorder.tokens[name] for recorder in (fitted, heldout)]
        total = (parts[0] + parts[1]).div_(sum(tokens))
        if count_infinite(total):
            continue
        damping, ratio = choose_damping(parts.pop(0).div_(tokens[0]), parts.pop().div_(tokens[1]))
        hessians[f"{prefix}.{name}"] = total.cpu()
        layers[f"{prefix}.{name}"] = {"damping": None if damping == float("inf") else damping, "heldout_ratio": ratio}
    return dict(sorted(hessians.items())), {"layers": dict(sorted(layers.items()))}
