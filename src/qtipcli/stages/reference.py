"""Owns the original's logits while several models are compared with it: computed once a window, kept in a file up to a cap.

A window's logits are (context - 1) * vocabulary numbers: 1 GB in float32 at 2,048 tokens and a vocabulary of 128,000. So they
may outgrow any disk: windows beyond the cap are computed again for each model, for which the original stays in memory. The
other way, to go through all models a group of windows at a time, would load every model again for each group instead.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch

from qtipcli.stages.evaluate import Logits
from qtipcli.stages.progress import Watcher
from qtipcli.tune.activations import Activations

DEFAULT_CACHE_GIB = 16.0
"""All of 64 windows of 2,048 tokens at a vocabulary of 32,000 in float32; a ninth of WikiText-2's test at 128,000."""

FREE_SHARE = 0.5
"""Of the temporary directory's free space at most this much is taken, so that others can go on writing."""


class KeptLogits(Logits):
    """Another model's logits, those of the first windows kept in a file in the temporary directory (TMPDIR).

    What comes back is what the model gave, bit for bit, on the CPU where it was kept. The file has no name and is gone with the
    process.

    Args:
        source: computes them; it is let go where all windows are kept.
        rows: windows in all.
        cap_bytes: of the file; 0 keeps nothing.
        watcher: hears of each window that is kept, and of windows that are not.

    Attributes: kept: windows in the file; bytes: of the file.
    Raises StorageError where the file cannot be written, and what `source` raises.
    """

    def __init__(self, source: Logits, rows: int, cap_bytes: int, watcher: Watcher) -> None:
        self.dtype, self.device = source.dtype, source.device
        self._source: Logits | None = source
        first = source.logits(0)
        allowed = min(cap_bytes, int(shutil.disk_usage(tempfile.gettempdir()).free * FREE_SHARE))
        window_bytes = first.numel() * first.element_size()
        self.kept = min(rows, allowed // window_bytes)
        self.bytes = self.kept * window_bytes
        if self.kept < rows:
            watcher.note(
                f"the original's logits of {self.kept} of {rows} windows are kept ({window_bytes / 2**30:.2g} GiB each, "
                f"{allowed / 2**30:.3g} GiB allowed): the original stays in memory and computes the others for each model"
            )
        self._file: Activations | None = None
        if self.kept:
            with tempfile.TemporaryDirectory(prefix="qtip-eval-") as directory:
                self._file = Activations([tuple(first.shape)] * self.kept, first.dtype, Path(directory) / "logits")
            watcher.begin("original", self.kept)
            for index in range(self.kept):
                self._file.write(index, source.logits(index) if index else first)
                watcher.advance("windows")
        if self.kept == rows:
            source.close()
            self._source = None

    def logits(self, index: int) -> torch.Tensor:
        """See evaluate.Logits."""
        if index < self.kept:
            assert self._file is not None
            return self._file.read(index)
        assert self._source is not None
        return self._source.logits(index)

    def close(self) -> None:
        """Give the file's space back."""
        if self._file is not None:
            self._file.close()
        if self._source is not None:
            self._source.close()
