"""Owns the calibrate stage: one proxy Hessian for each input of each decoder block, saved once for every bitrate.

The run directory holds the shard `tokens` and one shard for each block, `block-00000` and on, with a float32 [I, I] Hessian for
each group of linears that share an input, under the group's first name. Blocks are streamed: one is in memory at a time.
Asked for both sides, it also holds `outputs-00000` and on, with a float32 [O, O] Hessian for each linear.
Where the head is to be packed, the shard `head` holds the Hessian of its input; it can be added to a finished directory.
Several processes share the rows of text (qtipcli.stages.slices); the first one writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from qtipcli.config import CalibrationSettings
from qtipcli.data.text import CALIBRATION_DATA, load_documents
from qtipcli.data.windows import Windows, calibration_windows
from qtipcli.errors import QtipError
from qtipcli.job.directory import RunDirectory
from qtipcli.job.fingerprint import fingerprint_model, fingerprint_versions
from qtipcli.job.interrupt import interruptible
from qtipcli.job.processes import ALONE, Processes
from qtipcli.job.shared import SharedDirectory
from qtipcli.model.inputs import AfterBlocks, BlockInput, run_block
from qtipcli.model.linears import HessianRecorder, InputGroup, input_groups, mean_hessians, refuse_unsupported
from qtipcli.model.outer import find_head
from qtipcli.model.skeleton import Skeleton
from qtipcli.model.source import ModelSource
from qtipcli.stages import backward, streams
from qtipcli.stages.fitting import default_memory_gib
from qtipcli.stages.load import default_device
from qtipcli.stages.progress import Silent, Watcher
from qtipcli.stages.slices import DEFAULT_SLICES, OrderedSums, Text, note_idle, text_of

STAGE = "calibrate"
TOKENS = "tokens"
HEAD = "head"

LONGEST_DEFAULT_CONTEXT = 2048
"""Where neither the user nor the model asks for less: QTIP calibrates on longer windows, at a cost that grows with them."""

BATCH_TOKENS = 8192
"""Tokens that go through a block at once; fixed, so that sums do not depend on the machine."""


def block_key(index: int) -> str:
    """The shard that belongs to decoder block `index`, in this stage's and the quantize stage's run directory."""
    return f"block-{index:05d}"


def load_tokenizer(source: ModelSource) -> Any:
    """The model's own tokenizer. Raises QtipError if it has none that transformers can load."""
    try:
        return AutoTokenizer.from_pretrained(source.directory, trust_remote_code=source.trust_remote_code)
    # Files that somebody else wrote can make transformers raise anything.
    except Exception as error:
        raise QtipError(
            f"{source.name} has no tokenizer that transformers can load", "put the tokenizer's files beside config.json"
        ) from error


def load_windows(source: ModelSource, settings: CalibrationSettings) -> Windows:
    """The calibration windows that `settings` choose for this model."""
    tokenizer = load_tokenizer(source)
    longest, context = model_context(source), context_of(source, settings.context)
    if longest and context > longest:
        raise QtipError(f"--context {context} is more than the {longest} positions of {source.name}", f"use at most {longest}")
    documents = load_documents(settings.data or CALIBRATION_DATA, tokenizer)
    return calibration_windows(tokenizer, documents, settings.samples, context, settings.seed)


def context_of(source: ModelSource, asked: int | None) -> int:
    """Tokens in a window: those asked for, or the model's own up to LONGEST_DEFAULT_CONTEXT."""
    return asked or min(LONGEST_DEFAULT_CONTEXT, model_context(source) or LONGEST_DEFAULT_CONTEXT)


def model_context(source: ModelSource) -> int | None:
    """Positions that the model was made for, where its config says."""
    return getattr(source.config.get_text_config(), "max_position_embeddings", None)


def run(
    source: ModelSource,
    settings: CalibrationSettings,
    directory: Path,
    force: bool = False,
    watcher: Watcher | None = None,
    head: bool = False,
    two_sided: bool = False,
    limit_blocks: int | None = None,
    memory_gib: float | None = None,
    processes: Processes = ALONE,
) -> Path:
    """Fill `directory` with the model's proxy Hessians, going on where an earlier run stopped; returns it.

    head: also that of the head's input. two_sided: also those of the layers' outputs. limit_blocks: of the first blocks only;
    what is behind them, and the head, is left for another run. memory_gib: activations beyond this go to a file; None takes
    what is sensible here. processes: that share the rows of text. Neither changes a bit.
    Raises MismatchError where it holds another job, StoppedError after Ctrl-C, and what reading model and data raises.
    """
    watcher = watcher or Silent()
    # The first process reads the text for all: the others would have to wait for what it downloads, and then read it again.
    windows = processes.broadcast(load_windows(source, settings) if processes.is_main else None)
    if windows.requested and windows.rows < windows.requested:
        watcher.note(
            f"{windows.source} holds {windows.rows} windows of {windows.context} tokens, not {windows.requested}: all are used"
        )
    frozen = settings.model_dump() | {"data": settings.data or CALIBRATION_DATA, "context": windows.context}
    frozen |= {"slices": processes.broadcast(settings.slices or _slices_there(directory, force))}
    if frozen["slices"] == 1:
        del frozen["slices"]  # jobs that were started before there were slices go on
    fingerprint = {
        "model": fingerprint_model(source.directory),
        "data": windows.content_hash,
        "versions": fingerprint_versions(),
    }
    with (
        interruptible(notice=processes.is_main),
        SharedDirectory.join(processes, directory, STAGE, frozen, fingerprint, force) as job,
    ):
        if not job.done(TOKENS):
            job.commit(TOKENS, {TOKENS: windows.tokens}, {"rows": windows.rows, "context": windows.context})
        _record(source, windows.tokens, job, watcher, head, two_sided, limit_blocks, memory_gib, processes)
    return directory


def add(
    source: ModelSource,
    directory: Path,
    watcher: Watcher | None = None,
    head: bool = False,
    two_sided: bool = False,
    limit_blocks: int | None = None,
    memory_gib: float | None = None,
    processes: Processes = ALONE,
) -> None:
    """Add the Hessian of the head's input, or those of layers' outputs, to finished ones.

    They are made of the tokens that are stored there: the text is not needed. Raises QtipError where the model is another one
    or its head cannot be packed, StoppedError after Ctrl-C.
    """
    found = RunDirectory.load(directory, STAGE)
    if found.fingerprint.get("model") != fingerprint_model(source.directory):
        raise QtipError(f"{directory} was calibrated on another model than {source.name}", "give the Hessians of this model")
    with (
        interruptible(notice=processes.is_main),
        SharedDirectory.join(processes, directory, STAGE, found.settings, found.fingerprint) as job,
    ):
        tokens = job.read(TOKENS)[TOKENS]
        _record(source, tokens, job, watcher or Silent(), head, two_sided, limit_blocks, memory_gib, processes)


def slices_of(job: RunDirectory) -> int:
    """Slices that sums over the text of a calibrate job are taken in."""
    return job.settings.get("slices", 1)


def _slices_there(directory: Path, force: bool) -> int:
    """Those of the job in `directory`, which goes on as it was started; the default where there is none."""
    if force or not (directory / "job.json").is_file():
        return DEFAULT_SLICES
    return slices_of(RunDirectory.load(directory, STAGE))


def first_blocks(count: int, limit_blocks: int | None) -> range:
    """Which of `count` blocks a run works on that is limited to the first `limit_blocks`; None for all."""
    return range(count if limit_blocks is None else min(limit_blocks, count))


def is_complete(job: RunDirectory, skeleton: Skeleton, limit_blocks: int | None = None) -> bool:
    """Whether every decoder block's Hessians are there, of the first `limit_blocks`."""
    return all(job.done(block_key(index)) for index in first_blocks(len(skeleton.blocks), limit_blocks))


def block_keys(job: RunDirectory) -> list[str]:
    """The shards of the decoder blocks that are there, in the order in which they were done."""
    return [key for key in job.keys() if key.startswith("block-")]  # noqa: SIM118, no mapping


def has_output_side(job: RunDirectory, limit_blocks: int | None = None) -> bool:
    """Whether the Hessians of outputs are there for every block for which those of inputs are, of the first `limit_blocks`."""
    return not backward.missing_blocks(job, len(first_blocks(len(block_keys(job)), limit_blocks)))


def forward(skeleton: Skeleton, index: int, batches: list[BlockInput]) -> None:
    """Take every batch through block `index`, in place."""
    for batch in batches:
        batch.hidden = run_block(skeleton, index, batch)


def text_of_job(job: RunDirectory, tokens: torch.Tensor, processes: Processes) -> Text:
    """This process's part of the windows of a calibrate job, in batches for passes without gradients."""
    return text_of(tokens, slices_of(job), max(1, BATCH_TOKENS // tokens.shape[1]), processes)


def _record(
    source: ModelSource,
    tokens: torch.Tensor,
    job: SharedDirectory,
    watcher: Watcher,
    head: bool,
    two_sided: bool,
    limit_blocks: int | None,
    memory_gib: float | None,
    processes: Processes,
) -> None:
    skeleton = Skeleton(source, device=default_device())
    refuse_unsupported(skeleton)
    for note in skeleton.notes:
        watcher.note(note)
    text = text_of_job(job, tokens, processes)
    note_idle(text.slices, watcher)
    blocks = first_blocks(len(skeleton.blocks), limit_blocks)
    memory_gib = default_memory_gib() if memory_gib is None else memory_gib
    _Recording(skeleton, text, job, watcher, memory_gib).run(blocks, head and len(blocks) == len(skeleton.blocks))
    if two_sided:
        seed = job.settings["seed"]
        backward.run(skeleton, tokens, slices_of(job), seed, job, watcher, memory_gib, len(blocks), processes)


class _Recording:
    """One run over the inputs."""

    def __init__(self, skeleton: Skeleton, text: Text, job: SharedDirectory, watcher: Watcher, memory_gib: float) -> None:
        self.skeleton, self.text, self.job, self.watcher = skeleton, text, job, watcher
        self.memory_gib = memory_gib
        self.processes = text.slices.processes
        self.batches: list[BlockInput] = []

    def run(self, blocks: range, head: bool) -> None:
        if head:
            find_head(self.skeleton)
        count = len(blocks)
        missing = [index for index in blocks if not self.job.done(block_key(index))]
        head_missing = head and not self.job.done(HEAD)
        self.watcher.begin("calibrate", count + head, count + head - len(missing) - head_missing)
        if not missing and not head_missing:
            return
        if self.text.batches:
            name = f"inputs-{self.processes.rank}"
            self.batches = streams.first_inputs(
                self.skeleton, self.text.batches, self.job.path, self.memory_gib, self.watcher, name
            )
        self._blocks(missing, count if head_missing else missing[-1] + 1)
        if head_missing:
            self.processes.poll()
            self._head()
            self.watcher.advance(HEAD)

    def _blocks(self, missing: list[int], end: int) -> None:
        """Take the batches through the first `end` blocks, in place, and commit those that are `missing`."""
        # A resumed run takes the tokens through the finished blocks again: their outputs are not kept on disk.
        for index in range(end):
            self.processes.poll()
            block = self.skeleton.materialize(index)
            if index not in missing:
                forward(self.skeleton, index, self.batches)
                self.skeleton.release(index)
                continue
            found = input_groups(self.skeleton, index, self.batches[0]) if self.processes.is_main else None
            groups = self.processes.broadcast(found)
            sums = self._sums(groups)
            for number, places in self.text.slices.own.items():
                with HessianRecorder(block, groups) as recorder:
                    forward(self.skeleton, index, [self.batches[place] for place in places])
                sums.add(number, recorder.sums, recorder.tokens)
                del recorder  # with the sums of its slice
            prefix = self.skeleton.blocks[index][0]
            self._commit(block_key(index), f"{prefix}.", groups, sums)
            self.skeleton.release(index)
            self.watcher.advance(prefix)

    def _head(self) -> None:
        """Commit the Hessian of what the head is called with, of batches behind the last block. The head itself is not read."""
        name, head = find_head(self.skeleton)
        try:
            self.skeleton.materialize_outer()
            after = AfterBlocks(self.skeleton, self.text.row)
            groups = [InputGroup((name,), head.in_features)]
            sums = self._sums(groups)
            for number, places in self.text.slices.own.items():
                with HessianRecorder(self.skeleton.model, groups, self.skeleton.device) as recorder:
                    for place in places:
                        after.call_head(self.text.batches[place], self.batches[place].hidden, head)
                sums.add(number, recorder.sums, recorder.tokens)
                del recorder
        finally:
            self.skeleton.release_outer()
        self._commit(HEAD, "", groups, sums)

    def _sums(self, groups: Sequence[InputGroup]) -> OrderedSums:
        shapes = {group.names[0]: (group.in_features, group.in_features) for group in groups}
        return OrderedSums(self.text.slices, shapes, self.skeleton.device)

    def _commit(self, key: str, stem: str, groups: Sequence[InputGroup], sums: OrderedSums) -> None:
        names = [group.names[0] for group in groups]
        tokens = sums.counts(names)
        means = mean_hessians(sums.deliver(dict.fromkeys(names, 0)), tokens)
        report = {
            "groups": [
                {"names": [f"{stem}{name}" for name in group.names], "tokens": tokens[group.names[0]]} for group in groups
            ]
        }
        self.job.commit(key, {f"{stem}{name}": mean for name, mean in means.items()}, report)
