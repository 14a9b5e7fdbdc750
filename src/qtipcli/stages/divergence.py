"""Owns the measurement of a model in the making: KL(original || changed), with one model, whole, in memory.

What the original predicts is kept as what its last block returns, exact and a few hundred times smaller than logits. Then
weights are changed in place, and the model is run again from the first changed block on. The whole model lies in memory on the
default device, in float32; on a GPU that has no room for that in bfloat16, which is said in a note.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from qtipcli.job.interrupt import checkpoint
from qtipcli.model.inputs import AfterBlocks, capture_first_inputs, run_block
from qtipcli.model.skeleton import Skeleton
from qtipcli.model.source import ModelSource
from qtipcli.stages.distill import most_rows
from qtipcli.stages.evaluate import divergence
from qtipcli.stages.load import default_device
from qtipcli.stages.progress import Watcher

ROOM = 1.3
"""Memory that the weights may take with activations, logits and the allocator's waste, over the weights alone."""

CHUNK_LOGITS = 2**17
"""Logits that are float64 at a time: 1 MB an array, which stays in a core's cache."""

KEPT_BYTES = 1 << 30
"""Of the original's log-probabilities in float64; where they take more, they are made again for each comparison."""


class Reference:
    """The original's predictions for rows of tokens, and the model, to be changed and compared with them.

    Args:
        source: the original.
        rows: int64 [W, context].
        watcher: hears what precision there was room for.
        poll: a safe point, passed before each batch.

    Attributes:
        skeleton: the model, every block and everything outside of them in memory; weights may be changed in place.
        block: the first block that `divergence` runs; blocks before it must be as they were.
    """

    def __init__(self, source: ModelSource, rows: Tensor, watcher: Watcher, poll: Callable[[], None] = checkpoint) -> None:
        self._poll = poll
        device = default_device()
        self.skeleton = Skeleton(source, _dtype(source, device, watcher), device)
        self.block = 0
        vocabulary = source.config.get_text_config().vocab_size
        self._rows = rows.split(max(1, most_rows(rows.shape[1], vocabulary)))
        self._inputs = capture_first_inputs(self.skeleton, rows, len(self._rows[0]))
        self.skeleton.materialize_outer(head=True)
        self._after = AfterBlocks(self.skeleton, rows[:1])
        for index in range(len(self.skeleton.blocks)):
            self.skeleton.materialize(index)
        self._last = [self._through(index) for index in range(len(self._rows))]
        self._log_p: list[Tensor] | None = None
        if rows.numel() * vocabulary * torch.float64.itemsize <= KEPT_BYTES:
            self._log_p = [torch.log_softmax(self._original(index).double(), -1) for index in range(len(self._rows))]

    def advance(self) -> None:
        """Start one block later from now on; the block that is left behind must be as it was."""
        for batch in self._inputs:
            batch.hidden = run_block(self.skeleton, self.block, batch)
        self.block += 1

    @torch.no_grad()
    def divergence(self) -> Tensor:
        """KL(original || the model as it is) in nats, the mean of each row's predictions; float64 [W].

        All but the last position of a row count. Softmax, KL and means are float64.
        """
        means = []
        for index, rows in enumerate(self._rows):
            self._poll()
            changed = self._after.logits(rows, self._through(index))[:, :-1]
            original = self._original(index) if self._log_p is None else self._log_p[index]
            means.append(_divergences(original, changed, self._log_p is not None).mean(-1))
        return torch.cat(means).cpu()

    def change(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Give parameters other values, full name -> tensor of the same shape; returns what they had."""
        before = {}
        for name, tensor in weights.items():
            parameter = self.skeleton.model.get_parameter(name)
            before[name] = parameter.data
            parameter.data = tensor.to(parameter.device, parameter.dtype)
        return before

    @contextmanager
    def changed(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """While it is entered, parameters have other values."""
        before = self.change(weights)
        try:
            yield
        finally:
            self.change(before)

    def _original(self, index: int) -> Tensor:
        """The original's logits for batch `index` where they count, [rows, context - 1, vocabulary]."""
        return self._after.logits(self._rows[index], self._last[index])[:, :-1]

    def _through(self, index: int) -> Tensor:
        """What the last block returns for batch `index`, with the model as it is."""
        batch = self._inputs[index]
        hidden = batch.hidden
        for block in range(self.block, len(self.skeleton.blocks)):
            hidden = run_block(self.skeleton, block, type(batch)(hidden, batch.calls))
        return hidden


def _divergences(original: Tensor, changed: Tensor, is_log: bool) -> Tensor:
    """Of each prediction, float64 [R, P]. original, changed: [R, P, V], logits, or with `is_log` the original's log p."""
    step = max(1, CHUNK_LOGITS // original.shape[-1])
    parts = []
    for one, other in zip(original.flatten(0, 1).split(step), changed.flatten(0, 1).split(step), strict=True):
        log_p = one if is_log else torch.log_softmax(one.double(), -1)
        parts.append(divergence(log_p, torch.log_softmax(other.double(), -1)))
    return torch.cat(parts).reshape(original.shape[:2])


def _dtype(source: ModelSource, device: torch.device, watcher: Watcher) -> torch.dtype:
    if device.type != "cuda":
        return torch.float32
    weights = sum(torch.Size(source.shape(name)).numel() for name in source.tensor_names)
    free, _ = torch.cuda.mem_get_info(device)
    if ROOM * weights * torch.float32.itemsize <= free:
        return torch.float32
    watcher.note(f"{source.name} is measured in bfloat16: its {weights:,} weights do not fit into the GPU's memory in float32")
    return torch.bfloat16
