"""Owns the quantize stage: every linear of every decoder block rounded to its trellis, one shard a block.

A shard holds, for each layer, `<name>.trellis`, `<name>.scale_in`, `<name>.scale_out` (docs/format.md). With a quantized
prefix the stage makes its own Hessians, layer after layer, and corrects each layer for what rounding did to its input;
otherwise it reads those of the calibrate stage. With block tuning each block is tuned before the next is rounded, and its shard
also holds the norms and biases that were trained. What lies outside the blocks (qtipcli.stages.outer) has a shard for itself.
"""

from __future__ import annotations

import fnmatch
import math
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qtipcli.config import BlockTuning, QuantizeSettings
from qtipcli.errors import CorruptError, QtipError, SettingsError, first_line
from qtipcli.job.directory import RunDirectory
from qtipcli.job.fingerprint import fingerprint_model, fingerprint_text, fingerprint_versions
from qtipcli.job.interrupt import checkpoint, interruptible
from qtipcli.model.linears import find_linears, refuse_unsupported
from qtipcli.model.skeleton import Skeleton
from qtipcli.model.source import ModelSource, check_finite
from qtipcli.nn.layout import PackedLayout
from qtipcli.nn.linear import TrellisLinear
from qtipcli.quant.batches import InBatches
from qtipcli.quant.correction import corrected
from qtipcli.quant.matrix import PackedMatrix, RoundingSettings, round_group
from qtipcli.quant.output_side import OutputHessian
from qtipcli.quant.rows import row_sizes, with_row_sizes
from qtipcli.quant.transform import Transform
from qtipcli.stages import backward, calibrate, outer, streams
from qtipcli.stages.calibrate import block_key
from qtipcli.stages.few_tokens import FEW_TOKENS, StoredMoments
from qtipcli.stages.fitting import default_memory_gib
from qtipcli.stages.load import default_device
from qtipcli.stages.output_hessians import StoredOutputs
from qtipcli.stages.prefix import Prefix
from qtipcli.stages.progress import Silent, Watcher
from qtipcli.stages.rounding_rates import Group, rounding_bytes
from qtipcli.stages.shortage import explained
from qtipcli.stages.tune_blocks import BlockTuner, packed_layer
from qtipcli_kernels.codes import default_lut
from qtipcli_kernels.spec import TrellisSpec

STAGE = "quantize"

MOST_HELDOUT = 64
"""Calibration windows that block tuning never trains on, at most; a fifth where there are few."""

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
) -> Path:
    """Fill `directory` with the model's rounded layers, going on where an earlier run stopped; returns it.

    hessians: a finished calibrate run directory of the same model. limit_blocks: round the first blocks only; the others, and
    what lies outside the blocks, are left for another run. memory_gib: activations beyond this go to a file; None takes what is
    sensible here. It changes no bit.
    Raises MismatchError where either directory holds another job, QtipError where a layer cannot be rounded.
    """
    watcher = watcher or Silent()
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
    with interruptible(), RunDirectory.open(directory, STAGE, frozen, fingerprint, force=force) as job:
        stage = _Quantizer(source, settings, calibration, job, watcher)
        stage.memory_gib = default_memory_gib() if memory_gib is None else memory_gib
        blocks = calibrate.first_blocks(len(stage.skeleton.blocks), limit_blocks)
        stage.run(blocks)
        if len(blocks) < len(stage.skeleton.blocks):
            return directory
        stage.run_outer()
        if not job.done(CALIBRATION):
            rows = calibration.report(calibrate.TOKENS)["rows"]
            job.commit(CALIBRATION, {}, calibration.settings | {"samples": rows})
    return directory


def heldout_of(rows: int) -> int:
    """Calibration windows of `rows` that block tuning never trains on."""
    return max(1, min(MOST_HELDOUT, rows // 5))


class _Quantizer:
    """One run of the stage."""

    def __init__(
        self, source: ModelSource, settings: QuantizeSettings, calibration: RunDirectory, job: RunDirectory, watcher: Watcher
    ) -> None:
        self.skeleton = Skeleton(source, device=default_device())
        self.settings, self.calibration, self.job, self.watcher = settings, calibration, job, watcher
        self.luts: dict[TrellisSpec, torch.Tensor | None] = {}
        # What is being rounded, by its full names.
        self.now: list[str] = [source.name]
        self.encode = InBatches(self._note_smaller)
        self.memory_gib = streams.DEFAULT_MEMORY_GIB
        # Compiled once: an allocation has a pattern for each of what may be thousands of layers.
        self.overrides = [(re.compile(fnmatch.translate(pattern)), value) for pattern, value in settings.layers.items()]
        for note in self.skeleton.notes:
            watcher.note(note)
        refuse_unsupported(self.skeleton)
        refuse_unused_patterns(self.skeleton, settings)
        self.outer = outer.plan(self.skeleton, settings)
        if outer.needs_head_hessian(self.outer) and not calibration.done(calibrate.HEAD):
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
        prefix = self._start_prefix() if missing and self.settings.quantized_prefix else None
        try:
            for index in blocks:
                checkpoint()
                if index in missing:
                    with explained(lambda: self.now[0], self._takes_now):
                        tensors, report = self._round_block(index, prefix)
                    self.job.commit(block_key(index), tensors, report)
                    self.watcher.advance(self.skeleton.blocks[index][0])
                if prefix is not None and index < missing[-1]:
                    self.skeleton.materialize(index)
                    prefix.advance(index, self._stored_matrices(index))
                self.skeleton.release(index)
        finally:
            if prefix is not None:
                prefix.close()

    def _start_prefix(self) -> Prefix:
        tokens = self.calibration.read(calibrate.TOKENS)[calibrate.TOKENS]
        batches = tokens.split(max(1, calibrate.BATCH_TOKENS // tokens.shape[1]))
        names = ("original", "quantized")
        both, calls = streams.start(self.skeleton, batches, names, self.job.path, self.memory_gib, self.watcher)
        return Prefix(self.skeleton, *both, calls, tokens[:1], self.job.path, self.memory_gib)

    def run_outer(self) -> None:
        """Round what lies outside the blocks, one matrix in memory at a time."""
        missing = [matrix for matrix in self.outer.values() if not self.job.done(matrix.key)]
        if self.outer:
            self.watcher.begin("quantize outside the blocks", len(self.outer), len(self.outer) - len(missing))
        for matrix in missing:
            checkpoint()
            name, started = matrix.name, time.monotonic()
            self.now = [name]
            weight = self.skeleton.read(f"{name}.weight").to(self.skeleton.device, torch.float32)
            check_finite(f"{name}.weight", weight)
            size_O = row_sizes(weight)
            hessian_II = matrix.hessian(self.calibration).to(weight.device)
            with explained(lambda: self.now[0], self._takes_now):
                even = self._round({name: weight / size_O[:, None]}, hessian_II)[name]
            packed = with_row_sizes(even, size_O)
            report = self._report(name, packed, matrix.stand_in(), math.inf) | matrix.report()
            tensors = {f"{name}.{part}": tensor for part, tensor in self._stored(name, packed).items()}
            self._announce(name, report, time.monotonic() - started)
            self.job.commit(matrix.key, tensors, {"layers": {name: report}, "left": matrix.left()})
            self.watcher.advance(name)

    def _run_tuned(self, missing: list[int], settings: BlockTuning) -> None:
        """Round a block, tune it, and round the next one behind it."""
        tokens = self.calibration.read(calibrate.TOKENS)[calibrate.TOKENS]
        heldout = heldout_of(len(tokens))
        tuner = BlockTuner(self.skeleton, tokens, heldout, settings, self.job.path, self.watcher, self.memory_gib)
        try:
            for index in range(missing[-1] + 1):
                checkpoint()
                if index not in missing:
                    stored, tuned = self.job.read(block_key(index)), self.job.report(block_key(index))["tuned"]
                    tuner.skip(index, self._stored_layers(index, stored), {name: stored[name] for name in tuned})
                    continue
                with explained(lambda: self.now[0], self._takes_now):
                    tensors, report = self._round_block(index, tuner.prefix if self.settings.quantized_prefix else None)
                prefix, block = self.skeleton.blocks[index]
                vectors = [f"{prefix}.{name}" for name, parameter in block.named_parameters() if parameter.ndim == 1]
                dtypes = {name: self.skeleton.read(name).dtype for name in vectors if self.skeleton.holds(name)}
                layers = _packed_layers(report["layers"], tensors)
                tuned, tuning = tuner.tune(index, layers, {}, dtypes)
                report |= {"tuned": sorted(tuned.keys() & dtypes.keys()), "tuning": tuning}
                self.job.commit(block_key(index), tensors | tuned, report)
                self.watcher.advance(prefix)
        finally:
            tuner.close()

    def _stored_layers(self, index: int, tensors: Mapping[str, torch.Tensor]) -> dict[str, TrellisLinear]:
        return _packed_layers(self.job.report(block_key(index))["layers"], tensors)

    def _stored_matrices(self, index: int) -> dict[str, torch.Tensor]:
        """Full name -> the dense matrix that the stored layer stands for, for those of block `index`."""
        stored = self._stored_layers(index, self.job.read(block_key(index)))
        return {name: layer.to(self.skeleton.device).weight_dense() for name, layer in stored.items()}

    def _round_block(self, index: int, prefix: Prefix | None) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """(what the shard holds, its report). prefix: where the block's inputs come from; None for the calibrate stage's."""
        stem = f"{self.skeleton.blocks[index][0]}."
        linears = {f"{stem}{name}": linear for name, linear in find_linears(self.skeleton.materialize(index)).items()}
        tensors: dict[str, torch.Tensor] = {}
        layers: dict[str, Any] = {}
        left: dict[str, str] = {}
        rounded: dict[str, torch.Tensor] = {}
        stored_moments = StoredMoments(self.calibration, index, *self.skeleton.blocks[index])
        if prefix is not None:
            prefix.enter(index, stored_moments.groups)
        for names in stored_moments.groups:
            chosen = [name for name in names if not _matches(name, self.settings.skip)]
            left |= {name: "skipped by the settings" for name in names if name not in chosen}
            if not chosen:
                continue
            self.now = chosen
            moments = prefix.moments(index, names, rounded) if prefix else stored_moments.of(names, self.skeleton.device)
            if not moments.seen:
                left |= dict.fromkeys(chosen, "never called in calibration")
                continue
            started = time.monotonic()
            weights = {name: linears[name].weight for name in chosen}
            corrections: dict[str, float] = {}
            for name, weight in weights.items():
                check_finite(f"{name}.weight", weight)
                if name in moments.missing:
                    weights[name], corrections[name] = corrected(weight, *moments.missing[name])
            tokens, share, hessian_II = moments.tokens, moments.share, moments.mixed()
            del moments
            packed = self._round(weights, hessian_II, self._outputs(index, chosen))
            seconds = (time.monotonic() - started) / len(chosen)
            for name, matrix in packed.items():
                stored = {f"{name}.{part}": tensor for part, tensor in self._stored(name, matrix).items()}
                layers[name] = self._report(name, matrix, linears[name], corrections.get(name, math.inf))
                layers[name] |= {"tokens": tokens, "shared_hessian": share} if share else {}
                self._announce(name, layers[name], seconds)
                if prefix is not None:
                    layer = _packed_layers({name: layers[name]}, stored)[name].to(self.skeleton.device)
                    # The original is not needed any more.
                    rounded[name] = linears[name].weight.data = layer.weight_dense()
                tensors |= stored
        self._note_few_tokens(stem, layers)
        return tensors, {"layers": layers, "left": left}

    def _note_few_tokens(self, stem: str, layers: Mapping[str, Mapping[str, Any]]) -> None:
        few = {name: report["tokens"] for name, report in layers.items() if "shared_hessian" in report}
        if few:
            name = min(few, key=few.__getitem__)
            self.watcher.note(
                f"{stem[:-1]}: {len(few)} layers of experts saw fewer than {FEW_TOKENS} tokens for each of their inputs, "
                f"{name} only {few[name]}: the mean Hessian of the experts beside them was mixed in"
            )

    def _round(
        self,
        weights: dict[str, torch.Tensor],
        hessian_II: torch.Tensor,
        outputs: Mapping[str, OutputHessian] | None = None,
    ) -> dict[str, PackedMatrix]:
        settings = RoundingSettings(
            Transform.parse(self.settings.transform),
            self.settings.damping,
            self.settings.refit,
            scale=self.settings.scale,
            search=self.settings.search and self.settings.scale is None,
            fast=self.settings.fast,
            seed=self.settings.seed,
            transform_out=next((self.outer[name].transform_out for name in weights if name in self.outer), None),
        )
        specs = {name: self._spec(name) for name in weights}
        luts = {name: self._lut(spec) for name, spec in specs.items()}
        return round_group(weights, hessian_II, specs, settings, luts, outputs, self.encode, consume=True)

    def _outputs(self, index: int, names: list[str]) -> dict[str, OutputHessian] | None:
        """Hessians of the outputs of a group's layers; None where they are not asked for, or one had no gradients."""
        key = backward.output_key(index)
        if not self.settings.two_sided:
            return None
        layers = self.calibration.report(key)["layers"]
        if not all(name in layers for name in names):
            return None
        self.calibration.verify(key)
        return StoredOutputs(self.calibration, key, names, self.skeleton.device)

    def _note_smaller(self, tiles: int) -> None:
        self.watcher.note(f"{self.now[0]}: memory ran out, so that tiles are encoded {tiles} at a time from here on")

    def _takes_now(self) -> int:
        """Bytes that rounding takes of what is being rounded."""
        linears = [self._linear(name) for name in self.now]
        group = Group(tuple(linear.out_features for linear in linears), linears[0].in_features)
        return rounding_bytes(group, self.settings, self._spec(self.now[0]), self.skeleton.device)

    def _linear(self, name: str) -> torch.nn.Linear:
        return self.outer[name].stand_in() if name in self.outer else self.skeleton.model.get_submodule(name)

    def _spec(self, name: str) -> TrellisSpec:
        if name in self.outer:
            return self.outer[name].spec
        return self.settings.spec(next((value for pattern, value in self.overrides if pattern.match(name)), None))

    def _lut(self, spec: TrellisSpec) -> torch.Tensor | None:
        if spec not in self.luts:
            self.luts[spec] = default_lut(spec)
        return self.luts[spec]

    def _stored(self, name: str, matrix: PackedMatrix) -> dict[str, torch.Tensor]:
        stored = {"trellis": matrix.trellis, "scale_in": matrix.scale_in, "scale_out": matrix.scale_out}
        lut = self._lut(self._spec(name))
        return stored if lut is None else stored | {"lut": lut}

    def _report(self, name: str, matrix: PackedMatrix, linear: torch.nn.Linear, correction: float) -> dict[str, Any]:
        """What the ledger keeps of a layer; nothing in it depends on the clock. correction: its damping, infinite for none."""
        spec = self._spec(name)
        return {
            "code": spec.code,
            "bits_per_step": spec.bits_per_step,
            "weights_per_step": spec.weights_per_step,
            "state_bits": spec.state_bits,
            "transform": self.settings.transform,
            "shape": [linear.out_features, linear.in_features],
            "bias": linear.bias is not None,
            "relative_proxy_loss": matrix.relative_proxy_loss,
            "unrefitted_loss": matrix.unrefitted_loss,
            "scale": matrix.scale,
            "damping": matrix.damping,
            "dead_inputs": matrix.dead_inputs,
            "correction_damping": correction if math.isfinite(correction) else None,
            "divergence": matrix.divergence,
        }

    def _announce(self, name: str, report: Mapping[str, Any], seconds: float) -> None:
        rows, columns = report["shape"]
        self.watcher.row(
            {
                "layer": name,
                "shape": f"{rows} x {columns}",
                "bits": report["bits_per_step"] / report["weights_per_step"],
                "relative proxy loss": report["relative_proxy_loss"],
                "seconds": seconds,
            }
        )
        if report["damping"] > self.settings.damping:
            self.watcher.note(f"{name}: damping raised from {self.settings.damping:g} to {report['damping']:g}")
        if report["dead_inputs"]:
            self.watcher.note(f"{name}: {report['dead_inputs']} of {columns} inputs were always zero in calibration")


def _packed_layers(reports: Mapping[str, Mapping[str, Any]], tensors: Mapping[str, torch.Tensor]) -> dict[str, TrellisLinear]:
    """Full name -> layer, from what the ledger and the shard keep of them; biases are the model's own."""
    parts = ("trellis", "scale_in", "scale_out", "lut")
    return {
        name: packed_layer(
            layout_of(report), {part: tensors[f"{name}.{part}"] for part in parts if f"{name}.{part}" in tensors}
        )
        for name, report in reports.items()
    }


def layout_of(report: Mapping[str, Any]) -> PackedLayout:
    """The layout of a layer from what the ledger keeps of it. Raises CorruptError where that is not what was written."""
    try:
        spec = TrellisSpec(report["code"], report["bits_per_step"], report["state_bits"], report["weights_per_step"])
        sides = (Transform.parse(report["transform"]), Transform.parse(report.get("transform_out", report["transform"])))
        rows, columns = report["shape"]
        return PackedLayout(columns, rows, spec, *sides, report["bias"], report.get("embedding", False))
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptError(
            f"the ledger says of a layer what no ledger does: {first_line(error)}",
            "give the quantize command again with another --out",
        ) from error


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def refuse_unused_patterns(skeleton: Skeleton, settings: QuantizeSettings) -> None:
    """Raise SettingsError where a pattern of the settings fits no layer."""
    names = [f"{prefix}.{name}" for prefix, block in skeleton.blocks for name in find_linears(block)]
    for pattern in (*settings.skip, *settings.layers):
        if not fnmatch.filter(names, pattern):
            raise SettingsError(f"no layer is called {pattern!r}", f"names look like {names[0]}; * stands for anything")
