"""Owns evaluation block by block: a model's logits with one decoder block in memory at a time, and when that is the way to go.

All windows go through a block before the next one is loaded. What the last block returns is kept, in memory or in a file, and
final norm and head, which stay in memory, make a window's logits of it. Plain and packed models alike: a packed model's blocks
hold packed layers, as they do in the whole model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qtipcli.data.windows import Windows
from qtipcli.errors import QtipError
from qtipcli.hub.config import METHOD
from qtipcli.hub.quantizer import QtipHfQuantizer
from qtipcli.model import dequantized
from qtipcli.model.skeleton import Skeleton
from qtipcli.model.source import AGAIN, CONFIG_FILE, ModelSource
from qtipcli.stages.evaluate import BLOCK_BY_BLOCK, Logits, ModelLogits, check_fits, device_name
from qtipcli.stages.inspect import read_config
from qtipcli.stages.load import computing_dtype, default_device, load_model
from qtipcli.stages.progress import Watcher
from qtipcli.stages.room import free_bytes
from qtipcli.stages.streams import DEFAULT_MEMORY_GIB
from qtipcli.stages.teacher import Teacher
from qtipcli.untrusted import read_table

WEIGHTS_SHARE = 0.8
"""Of the free memory, that whole models may take: the rest is for logits and what flows between blocks."""

Opened = Callable[[Windows], Logits]
"""A model that is ready: windows -> its logits on them."""


class StreamedLogits(Logits):
    """Logits of a model of which one block is in memory at a time; see evaluate.Logits.

    Args:
        skeleton: the model; it belongs to this object from now on.
        windows: as evaluation_windows makes them.
        watcher: hears of each block, under `title`.
        memory_gib: hidden states beyond this go to a file in the temporary directory (TMPDIR), which has no name.

    Raises what evaluate.ModelLogits raises, StorageError, and QtipError where the blocks form no chain.
    """

    placement = BLOCK_BY_BLOCK

    def __init__(
        self,
        skeleton: Skeleton,
        windows: Windows,
        watcher: Watcher,
        title: str = "stream",
        memory_gib: float = DEFAULT_MEMORY_GIB,
    ) -> None:
        check_fits(skeleton.model.config, windows)
        self.dtype, self.device = str(skeleton.dtype).removeprefix("torch."), device_name(skeleton.device)
        batches = list(windows.tokens.split(1))
        with tempfile.TemporaryDirectory(prefix="qtip-eval-") as directory, torch.no_grad():
            self._end = Teacher(skeleton, batches, Path(directory), watcher, memory_gib, title=title)

    def logits(self, index: int) -> Tensor:
        """See Logits."""
        return self._end.logits(index)[0, :-1]

    def close(self) -> None:
        """Give memory and files back."""
        self._end.close()


def open_model(name: str, dtype: torch.dtype | None, trust_remote_code: bool, stream: bool, watcher: Watcher) -> Opened:
    """The model, whole or block by block; dtype as in load_model. Raises what load_model and open_skeleton raise."""
    if not stream:
        model = load_model(name, dtype, trust_remote_code)
        return lambda windows: ModelLogits(model, windows)

    def streamed(windows: Windows) -> Logits:
        skeleton = open_skeleton(name, dtype, trust_remote_code)
        for note in skeleton.notes:
            watcher.note(f"{name}: {note}")
        return StreamedLogits(skeleton, windows, watcher, f"stream {name}")

    return streamed


def open_skeleton(name: str, dtype: torch.dtype | None = None, trust_remote_code: bool = False) -> Skeleton:
    """A plain or packed model without its weights, on the default device; dtype as in load_model.

    Raises QtipError where it is quantized by another method, and what ModelSource.open and Skeleton raise.
    """
    source = ModelSource.open(name, trust_remote_code=trust_remote_code, accepted_method=METHOD)
    return Skeleton(source, computing_dtype(source.config, dtype), default_device(), packed_modules_of(source))


def packed_modules_of(source: ModelSource) -> Callable[[PreTrainedModel], None] | None:
    """What puts the packed modules of a packed model into its skeleton, for Skeleton's `prepare`; None of a plain model."""
    fields = read_table(source.directory / CONFIG_FILE, AGAIN)
    if fields.get("quantization_config") is None or dequantized.is_one(fields):
        return None
    quantizer = QtipHfQuantizer(read_config(source.directory))
    files = source.shards if all(shard.is_file() for shard in source.shards) else None
    return lambda model: quantizer.place_modules(model, files)


def must_stream(
    models: Sequence[tuple[str, torch.dtype | None]], trust_remote_code: bool, asked: bool | None, watcher: Watcher
) -> bool:
    """Whether models (name, dtype as in load_model) that would be in memory together are to be evaluated block by block.

    asked: what the user said; None streams where they would take more than WEIGHTS_SHARE of the free memory, and says so.
    """
    if asked is not None:
        return asked
    device = default_device()
    free = free_bytes(device)
    try:
        needed = sum(weight_bytes(name, dtype, trust_remote_code, device) for name, dtype in models)
    except QtipError:  # a format that only transformers reads: there is no other way than to load it
        return False
    if needed <= WEIGHTS_SHARE * free:
        return False
    names = " and ".join(dict.fromkeys(name for name, _ in models))
    watcher.note(
        f"{names} would take {needed / 2**30:.3g} GiB and {free / 2**30:.3g} GiB are free: evaluated block by "
        "block, one decoder block in memory (--no-stream loads whole models)"
    )
    return True


def weight_bytes(name: str, dtype: torch.dtype | None, trust_remote_code: bool, device: torch.device) -> int:
    """What the model's weights take in memory in load_model's dtype, from headers alone; raises as ModelSource.open does."""
    source = ModelSource.open(name, trust_remote_code=trust_remote_code, accepted_method=METHOD)
    return loaded_bytes(source, dtype, device)


def loaded_bytes(source: ModelSource, dtype: torch.dtype | None, device: torch.device) -> int:
    """What the weights of an opened model take in memory in load_model's dtype."""
    chosen = dtype or (None if device.type == "cuda" else torch.float32)
    packed = {key.removesuffix("trellis") for key in source.tensor_names if key.endswith(".trellis")}
    total = 0
    for key in source.tensor_names:
        stored = source.dtype(key)
        is_packed = key[: key.rfind(".") + 1] in packed
        kept = stored if is_packed or chosen is None or not stored.is_floating_point else chosen
        total += torch.Size(source.shape(key)).numel() * kept.itemsize
    return total


def converted_bytes(source: ModelSource, dtype: torch.dtype) -> int:
    """Bytes on disk of the tensors whose dtype changes when the model is loaded: they stay mapped beside their copies."""
    packed = tuple(key.removesuffix("trellis") for key in source.tensor_names if key.endswith(".trellis"))
    changed = [key for key in source.tensor_names if source.dtype(key) != dtype and not key.startswith(packed)]
    return sum(torch.Size(source.shape(key)).numel() * source.dtype(key).itemsize for key in changed)
