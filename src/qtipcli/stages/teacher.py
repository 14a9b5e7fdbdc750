"""Owns the teacher: the original model's predictions for each batch of rows, without the original model in memory.

Its blocks are streamed once; what the last block returns is kept, exact in float32 and a few hundred times smaller than logits.
Final norm and head, which stay in memory, make the logits from it whenever they are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from qtipcli.job.processes import ALONE, Processes
from qtipcli.model.inputs import AfterBlocks, run_block
from qtipcli.model.skeleton import Skeleton
from qtipcli.stages import streams
from qtipcli.stages.progress import Watcher


class Teacher:
    """The original's logits for batches of rows, int64 [rows, context] each.

    Args:
        skeleton: the original; afterwards everything outside its blocks stays in memory.
        batches: the rows.
        directory: where hidden states go that do not fit into `memory_gib` GiB.
        watcher: hears of each block that is done.
        processes: those that stop together; each has batches of its own.
        title: what the watcher hears.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        batches: Sequence[Tensor],
        directory: Path,
        watcher: Watcher,
        memory_gib: float,
        processes: Processes = ALONE,
        title: str = "teacher",
    ) -> None:
        self._skeleton, self._batches = skeleton, batches
        (self._last,), calls = streams.start(skeleton, batches, [f"teacher-{processes.rank}"], directory, memory_gib, watcher)
        watcher.begin(title, len(skeleton.blocks))
        for block in range(len(skeleton.blocks)):
            processes.checkpoint()
            skeleton.materialize(block)
            for index in range(len(batches)):
                self._last.write(index, run_block(skeleton, block, streams.batch_at(self._last, calls, index)))
            skeleton.release(block)
            watcher.advance(skeleton.blocks[block][0])
        skeleton.materialize_outer(head=True)
        self._after = AfterBlocks(skeleton, batches[0][:1])

    @torch.no_grad()
    def logits(self, index: int) -> Tensor:
        """Of batch `index`, [rows, context, vocabulary]."""
        return self._after.logits(self._batches[index], self._last.read(index))

    def close(self) -> None:
        """Give memory and files back."""
        self._last.close()
        self._skeleton.release_outer()
