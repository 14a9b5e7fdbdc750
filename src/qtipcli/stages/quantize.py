"""Owns the quantize stage: every linear of every decoder block rounded to its trellis, one shard a block.

A shard holds, for each layer, `<name>.trellis`, `<name>.scale_in`, `<name>.scale_out` (docs/format.md). With a quantized
prefix the stage makes its own Hessians, layer after layer, and corrects each layer for what rounding did to its input;
otherwise it reads those of the calibrate stage. With block tuning each block is tuned before the next is rounded, and its shard
also holds the norms and biases that were trained. What lies outside the blocks (qtipcli.stages.outer) has a shard for itself.
Several processes share whole groups where these do not depend on one another, and the tiles of each where they do.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qtipcli.config import BlockTuning, QuantizeSettings
from qtipcli.errors import QtipError, SettingsError
from qtipcli.job.directory import RunDirectory
from qtipcli.job.fingerprint import fingerprint_model, fingerprint_text, fingerprint_versions
from qtipcli.job.interrupt import interruptible
from qtipcli.job.processes import ALONE, Processes, Sent
from qtipcli.job.shared import SharedDirectory
from qtipcli.model.linears import refuse_unsupported
from qtipcli.model.skeleton import Skeleton
from qtipcli.model.source import ModelSource, check_finite
from qtipcli.nn.linear import TrellisLinear
from qtipcli.quant.rows import row_sizes, with_row_sizes
from qtipcli.stages import calibrate, outer, spread, streams
from qtipcli.stages.calibrate import block_key
from qtipcli.stages.few_tokens import StoredMoments, peers_of
from qtipcli.stages.fitting import default_memory_gib
from qtipcli.stages.load import default_device
from qtipcli.stages.prefix import HELDOUT_SHARE, Prefix
from qtipcli.stages.progress import Silent, Watcher
from qtipcli.stages.rounder import RoundedBlock, Rounder
from qtipcli.stages.shared_encoder import SharedEncoder
from qtipcli.stages.shortage import explained
from qtipcli.stages.slices import note_idle
from qtipcli.stages.spread import Parcel, least_loaded
from qtipcli.stages.stored_layers import packed_layers
from qtipcli.stages.tune_blocks import BlockTuner

STAGE = "quantize"

MOST_HELDOUT = 64
"""Calibration windows that block tuning never trains on, at most; a fifth where there are few."""

MOST_UNDERWAY = 16
"""Results that a process holds until the first one has taken them, before it waits."""

CALIBRATION = "calibration"
"""The shard, without tensors, whose report says what text the Hessians were made of; last, and absent from older jobs."""


def run(
    source: ModelSource,
    settings: QuantizeSettings,
    hessians: Path,
    directory: Path,
    force: bool = False,
    watcher: Watcher | None = None,
    limit_blocks: int | None = None,
    memory_gib: float | None = None,
    processes: Processes = ALONE,
) -> Path:
    """Fill `directory` with the model's rounded layers, going on where an earlier run stopped; returns it.

    hessians: a finished calibrate run directory of the same model. limit_blocks: round the first blocks only; the others, and
    what lies outside the blocks, are left for another run. memory_gib: activations beyond this go to a file; None takes what is
    sensible here. processes: that share the work. Neither changes a bit.
    Raises MismatchError where either directory holds another job, QtipError where a layer cannot be rounded.
    """
    watcher = watcher or Silent()
    refuse_shared(settings, processes)
    calibration = RunDirectory.load(hessians, calibrate.STAGE)
    model = fingerprint_model(source.directory)
    if calibration.fingerprint.get("model") != model:
        raise QtipError(f"{hessians} was calibrated on another model than {source.name}", "give the Hessians of this model")
    fingerprint = {
        "model": model,
        "calibration": fingerprint_text(repr(calibration.settings), repr(calibration.fingerprint)),
        "versions": fingerprint_versions(),
    }
    if settings.two_sided and not calibrate.has_output_side(calibration, limit_blocks):
        raise QtipError(f"{hessians} has no Hessians of outputs", "qtip calibrate --two-sided, or quantize with --one-sided")
    frozen = settings.model_dump()
    if settings.tune_blocks is None:
        del frozen["tune_blocks"]  # jobs that were started before there was tuning go on
    for name in ("head_bits", "embedding_bits"):
        if frozen[name] is None:
            del frozen[name]  # as above
    with (
        interruptible(notice=processes.is_main),
        SharedDirectory.join(processes, directory, STAGE, frozen, fingerprint, force) as job,
    ):
        memory_gib = default_memory_gib() if memory_gib is None else memory_gib
        stage = _Quantizer(source, settings, calibration, job, watcher, processes, memory_gib)
        blocks = calibrate.first_blocks(len(stage.skeleton.blocks), limit_blocks)
        stage.run(blocks)
        if len(blocks) < len(stage.skeleton.blocks):
            return directory
        stage.run_outer()
        if not job.done(CALIBRATION):
            rows = calibration.report(calibrate.TOKENS)["rows"]
            job.commit(CALIBRATION, {}, calibration.settings | {"samples": rows})
    return directory


def refuse_shared(settings: QuantizeSettings, processes: Processes) -> None:
    """Raise SettingsError where several processes cannot do what `settings` ask for."""
    if settings.tune_blocks is not None and not processes.is_alone:
        raise SettingsError(
            "--tune-blocks adds gradients in an order that depends on the number of processes: it runs on one",
            "quantize without it, then qtip finetune --blocks on several",
        )


def heldout_of(rows: int) -> int:
    """Calibration windows of `rows` that block tuning never trains on."""
    return max(1, min(MOST_HELDOUT, rows // 5))


class _Quantizer:
    """One run of the stage."""

    def __init__(
        self,
        source: ModelSource,
        settings: QuantizeSettings,
        calibration: RunDirectory,
        job: SharedDirectory,
        watcher: Watcher,
        processes: Processes,
        memory_gib: float,
    ) -> None:
        self.skeleton = Skeleton(source, device=default_device())
        self.settings, self.calibration, self.job, self.watcher = settings, calibration, job, watcher
        self.processes = processes
        for note in self.skeleton.notes:
            watcher.note(note)
        refuse_unsupported(self.skeleton)
        self.rounder = Rounder(self.skeleton, settings, calibration, watcher)
        self.encode = SharedEncoder(processes, self.rounder.encode)
        self.memory_gib = memory_gib
        if outer.needs_head_hessian(self.rounder.outer) and not calibration.done(calibrate.HEAD):
            raise QtipError(
                f"{calibration.path} has no Hessian of the head's input", "add it: qtip calibrate --head, else as before"
            )

    def run(self, blocks: range) -> None:
        """Round these blocks, the first ones."""
        missing = [index for index in blocks if not self.job.done(block_key(index))]
        self.watcher.begin("quantize", len(blocks), len(blocks) - len(missing))
        if missing and self.settings.tune_blocks is not None:
            self._run_tuned(missing, self.settings.tune_blocks)
            return
        if missing and self.settings.quantized_prefix:
            self._run_behind_prefix(missing)
        elif missing:
            self._run_spread(missing)

    def _run_behind_prefix(self, missing: list[int]) -> None:
        """Round block after block, each on what the rounded ones before it give."""
        prefix = self._start_prefix()
        try:
            for index in range(missing[-1] + 1):
                self.processes.poll()
                if index in missing:
                    with explained(lambda: self.rounder.now[0], self.rounder.takes_now):
                        tensors, report = self._round_block(index, prefix)
                    self.job.commit(block_key(index), tensors, report)
                    self.watcher.advance(self.skeleton.blocks[index][0])
                if index < missing[-1]:
                    self.skeleton.materialize(index)
                    prefix.advance(index, self._stored_matrices(index))
                self.skeleton.release(index)
        finally:
            prefix.close()

    def _start_prefix(self) -> Prefix:
        tokens = self.calibration.read(calibrate.TOKENS)[calibrate.TOKENS]
        text = calibrate.text_of_job(self.calibration, tokens, self.processes)
        note_idle(text.slices, self.watcher)
        names = [f"{name}-{self.processes.rank}" for name in ("original", "quantized")]
        both, calls = streams.start(self.skeleton, text.batches, names, self.job.path, self.memory_gib, self.watcher)
        given = (text.row, self.job.path, self.memory_gib, text.slices, text.heldout(HELDOUT_SHARE))
        return Prefix(self.skeleton, *both, calls, *given)

    def _run_spread(self, missing: list[int]) -> None:
        """Round groups that do not depend on one another, each in one process; the first one commits block after block."""
        loads = [0.0] * self.processes.world
        underway: deque[Sent] = deque()
        for index in missing:
            self.processes.poll()
            groups = [group["names"] for group in self.calibration.report(block_key(index))["groups"]]
            # Given out in the order of the blocks, so that no process runs far ahead of what the first one waits for.
            owners = least_loaded({names[0]: self.rounder.cost(names) for names in groups}, loads)
            own = [names for names in groups if owners[names[0]] == self.processes.rank]
            with explained(lambda: self.rounder.now[0], self.rounder.takes_now):
                found = dict(self._rounded_alone(index, own)) if own else {}
            if not self.processes.is_main:
                for parcel in found.values():
                    underway.extend(spread.send(self.processes, parcel, 0))
                while len(underway) > MOST_UNDERWAY:
                    underway.popleft().wait()
                continue
            block = RoundedBlock(self.rounder)
            for names in groups:
                block.take(found.get(names[0]) or spread.receive(self.processes, owners[names[0]]))
            self.job.commit_unseen(block_key(index), block.tensors, block.report(self.skeleton.blocks[index][0]))
            self.watcher.advance(self.skeleton.blocks[index][0])
        for sent in underway:
            sent.wait()
        self.job.meet()

    def _rounded_alone(self, index: int, groups: Sequence[Sequence[str]]) -> Iterator[tuple[str, Parcel]]:
        """(first name, result) of these groups of block `index`, under the calibrate stage's Hessians."""
        self.skeleton.materialize(index)
        stored = StoredMoments(self.calibration, index, *self.skeleton.blocks[index])
        for names in groups:
            yield (
                names[0],
                self.rounder.round_names(index, names, partial(stored.of, names, self.skeleton.device), self.rounder.encode),
            )
        self.skeleton.release(index)

    def run_outer(self) -> None:
        """Round what lies outside the blocks, one matrix in memory at a time."""
        missing = [matrix for matrix in self.rounder.outer.values() if not self.job.done(matrix.key)]
        if self.rounder.outer:
            self.watcher.begin("quantize outside the blocks", len(self.rounder.outer), len(self.rounder.outer) - len(missing))
        for matrix in missing:
            self.processes.poll()
            name, started = matrix.name, time.monotonic()
            self.rounder.now = [name]
            weight = self.skeleton.read(f"{name}.weight").to(self.skeleton.device, torch.float32)
            check_finite(f"{name}.weight", weight)
            size_O = row_sizes(weight)
            hessian_II = matrix.hessian(self.calibration).to(weight.device)
            with explained(lambda: self.rounder.now[0], self.rounder.takes_now):
                even = self.rounder.round({name: weight / size_O[:, None]}, hessian_II, None, self.encode)[name]
            packed = with_row_sizes(even, size_O)
            report = self.rounder.report(name, packed, matrix.stand_in(), math.inf) | matrix.report()
            tensors = {f"{name}.{part}": tensor for part, tensor in self.rounder.stored(name, packed).items()}
            self.rounder.announce(name, report, time.monotonic() - started)
            self.job.commit(matrix.key, tensors, {"layers": {name: report}, "left": matrix.left()})
            self.watcher.advance(name)

    def _run_tuned(self, missing: list[int], settings: BlockTuning) -> None:
        """Round a block, tune it, and round the next one behind it."""
        tokens = self.calibration.read(calibrate.TOKENS)[calibrate.TOKENS]
        heldout = heldout_of(len(tokens))
        tuner = BlockTuner(self.skeleton, tokens, heldout, settings, self.job.path, self.watcher, self.memory_gib)
        try:
            for index in range(missing[-1] + 1):
                self.processes.poll()
                if index not in missing:
                    stored, tuned = self.job.read(block_key(index)), self.job.report(block_key(index))["tuned"]
                    tuner.skip(index, self._stored_layers(index, stored), {name: stored[name] for name in tuned})
                    continue
                with explained(lambda: self.rounder.now[0], self.rounder.takes_now):
                    if self.settings.quantized_prefix:
                        tensors, report = self._round_block(index, tuner.prefix)
                    else:
                        tensors, report = self._round_stored(index)
                prefix, block = self.skeleton.blocks[index]
                vectors = [f"{prefix}.{name}" for name, parameter in block.named_parameters() if parameter.ndim == 1]
                dtypes = {name: self.skeleton.read(name).dtype for name in vectors if self.skeleton.holds(name)}
                layers = packed_layers(report["layers"], tensors)
                tuned, tuning = tuner.tune(index, layers, {}, dtypes)
                report |= {"tuned": sorted(tuned.keys() & dtypes.keys()), "tuning": tuning}
                self.job.commit(block_key(index), tensors | tuned, report)
                self.watcher.advance(prefix)
        finally:
            tuner.close()

    def _stored_layers(self, index: int, tensors: Mapping[str, torch.Tensor]) -> dict[str, TrellisLinear]:
        return packed_layers(self.job.report(block_key(index))["layers"], tensors)

    def _stored_matrices(self, index: int) -> dict[str, torch.Tensor]:
        """Full name -> the dense matrix that the stored layer stands for, for those of block `index`."""
        stored = self._stored_layers(index, self.job.read(block_key(index)))
        return {name: layer.to(self.skeleton.device).weight_dense() for name, layer in stored.items()}

    def _round_block(self, index: int, prefix: Prefix) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """(what the shard holds, its report). prefix: where the block's inputs come from."""
        stem, block = self.skeleton.blocks[index]
        self.skeleton.materialize(index)
        groups = [group["names"] for group in self.calibration.report(block_key(index))["groups"]]
        self.calibration.verify(block_key(index))
        prefix.enter(index, groups)
        found = RoundedBlock(self.rounder)
        dense: dict[str, torch.Tensor] = {}
        for together in self._independent(groups, stem, block):
            # Where there are enough of them, each process rounds some alone; else all round each of them together.
            spreads = len(together) >= self.processes.world > 1
            costs = {names[0]: self.rounder.cost(names) for names in together}
            owners = least_loaded(costs, [0.0] * self.processes.world) if spreads else {}
            own: dict[str, Parcel] = {}
            for names in together:
                ask = partial(prefix.moments, index, names, dense)
                if not owners:
                    own[names[0]] = self.rounder.round_names(index, names, ask, self.encode)
                elif owners[names[0]] == self.processes.rank:
                    own[names[0]] = self.rounder.round_names(index, names, ask, self.rounder.encode)
                elif self.rounder.chosen(names):
                    ask()  # all sum up together
            for names in together:
                parcel = own.get(names[0])
                if owners:
                    parcel = spread.exchange(self.processes, parcel, owners[names[0]])
                assert parcel is not None, "each group is rounded by one process, or by all"
                found.take(parcel)
                layers = packed_layers(parcel.report["layers"], parcel.tensors)
                for name, layer in layers.items():
                    dense[name] = layer.to(self.skeleton.device).weight_dense()
                    self.skeleton.model.get_submodule(name).weight.data = dense[name]  # the original is not needed any more
        return found.tensors, found.report(stem)

    def _round_stored(self, index: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """As `_round_block`, on what the original model gives the block."""
        found = RoundedBlock(self.rounder)
        for _, parcel in self._rounded_alone(
            index, [group["names"] for group in self.calibration.report(block_key(index))["groups"]]
        ):
            found.take(parcel)
        return found.tensors, found.report(self.skeleton.blocks[index][0])

    def _independent(self, groups: Sequence[Sequence[str]], stem: str, block: torch.nn.Module) -> Iterator[list[Sequence[str]]]:
        """The groups in their order, those of experts at one place together, which do not depend on one another."""
        peers = peers_of(groups, stem, block)
        together: list[Sequence[str]] = []
        for names in groups:
            place = peers.place(names[0])
            if together and (place is None or place != peers.place(together[0][0]) or self.processes.is_alone):
                yield together
                together = []
            together.append(names)
        if together:
            yield together
