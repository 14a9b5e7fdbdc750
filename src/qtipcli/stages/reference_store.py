"""Owns the original's logits that stay for later runs: one safetensors file a window, in a directory of the user's.

A window's logits depend on the original, on the dtype and machine that computed them, and on the window's own tokens; a file is
found by a hash of these, so that another text, number of windows or context takes what is there and adds what is not.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from qtipcli.data.windows import Windows
from qtipcli.errors import storage_error
from qtipcli.hub.config import METHOD
from qtipcli.job.fingerprint import fingerprint_bytes, fingerprint_model, fingerprint_text, fingerprint_versions
from qtipcli.job.lock import Lock
from qtipcli.job.shards import open_shard, write_shard
from qtipcli.model.source import ModelSource
from qtipcli.stages.evaluate import Logits, device_name
from qtipcli.stages.load import default_device
from qtipcli.stages.progress import Watcher
from qtipcli.stages.reference import FREE_SHARE

TENSOR = "logits"
LOCK_FILE = "lock"


def original_key(name: str, dtype: torch.dtype | None, trust_remote_code: bool) -> str:
    """What else than its tokens decides a window's logits: the model's content, the dtype and device, the versions.

    Raises what ModelSource.open raises: logits of a model without safetensors are not kept.
    """
    source = ModelSource.open(name, trust_remote_code=trust_remote_code, accepted_method=METHOD)
    parts = (fingerprint_model(source.directory), fingerprint_versions())
    return fingerprint_text(*map(str, parts), str(dtype), device_name(default_device()))


class StoredLogits(Logits):
    """Another model's logits, read from `directory` where they are, else computed and put there up to a cap.

    Args:
        directory: made if absent. No other process may add to it meanwhile (BusyError).
        key: of the original, see `original_key`.
        windows: whose logits these are.
        source: gives what computes them; called only where some are missing, and let go where all are stored then.
        cap_bytes: of all files in `directory` that were there or are added; files that are there are used whatever it is.
        watcher: hears of each window that is added, and of windows that are not.

    Attributes: found, added: windows that were there, and that were put there.
    Raises StorageError, CorruptError where a file is damaged, and what `source` raises.
    """

    def __init__(
        self, directory: Path, key: str, windows: Windows, source: Callable[[], Logits], cap_bytes: int, watcher: Watcher
    ) -> None:
        self._source: Logits | None = None
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(error, directory) from error
        lock = Lock(directory / LOCK_FILE)
        try:
            self._files = [_file_of(directory, key, row) for row in windows.tokens]
            missing = [index for index, file in enumerate(self._files) if not file.is_file()]
            self.found, self.added = windows.rows - len(missing), 0
            if missing:
                self._add(missing, source(), directory, cap_bytes, watcher)
        finally:
            lock.release()
        stored = next((file for file in self._files if file.is_file()), None)
        if stored is not None:
            with open_shard(stored) as shard:
                self.dtype = shard.metadata()["dtype"]
        else:
            assert self._source is not None
            self.dtype = self._source.dtype
        self.device = device_name(default_device())

    def _add(self, missing: list[int], source: Logits, directory: Path, cap_bytes: int, watcher: Watcher) -> None:
        used = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
        left = min(cap_bytes - used, int(shutil.disk_usage(directory).free * FREE_SHARE))
        watcher.begin("original", len(missing))
        for index in missing:
            logits = source.logits(index)
            size = logits.numel() * logits.element_size()
            if size > left:
                break
            write_shard(self._files[index], {TENSOR: logits}, {"dtype": source.dtype})
            left, self.added = left - size, self.added + 1
            watcher.advance("windows")
        if self.added < len(missing):
            self._source = source
            watcher.note(
                f"the original's logits of {self.found + self.added} of {len(self._files)} windows are in {directory}, which "
                f"may take {cap_bytes / 2**30:.3g} GiB: the original stays in memory and computes the others"
            )
        else:
            source.close()

    def logits(self, index: int) -> torch.Tensor:
        """See evaluate.Logits."""
        file = self._files[index]
        if self._source is not None and not file.is_file():
            return self._source.logits(index)
        with open_shard(file) as shard:
            return shard.get_tensor(TENSOR)

    def close(self) -> None:
        """Let the original go; the files stay."""
        if self._source is not None:
            self._source.close()


def _file_of(directory: Path, key: str, row_T: torch.Tensor) -> Path:
    return directory / f"{fingerprint_bytes(key.encode(), row_T.numpy().tobytes())[:40]}.safetensors"
