"""Owns the quantize stage: every linear of every decoder block rounded to its trellis, one shard a block.

A shard holds, for each layer, `<name>.trellis`, `<name>.scale_in`, `<name>.scale_out` (docs/format.md). With a quantized
prefix the stage makes its own Hessians, block by block; otherwise it reads those of the calibrate stage. With block tuning
each block is tuned before the next is rounded, and its shard also holds the norms and biases that were trained.
"""

from __future__ import annotations

import fnmatch
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from qtipcli.config import BlockTuning, QuantizeSettings
from qtipcli.errors import QtipError, SettingsError
from qtipcli.job.directory import RunDirectory
from qtipcli.job.fingerprint import fingerprint_model, fingerprint_text, fingerprint_versions
from qtipcli.job.interrupt import checkpoint, interruptible
from qtipcli.model.inputs import BlockInput, capture_first_inputs
from qtipcli.model.linears import HessianRecorder, InputGroup, find_linears, unsupported
from qtipcli.model.skeleton import Skeleton
from qtipcli.model.source import ModelSource, check_finite
from qtipcli.nn.layout import PackedLayout
from qtipcli.nn.linear import TrellisLinear
from qtipcli.quant.matrix import PackedMatrix, RoundingSettings, round_group
from qtipcli.quant.transform import Transform
from qtipcli.stages import calibrate
from qtipcli.stages.calibrate import block_key
from qtipcli.stages.load import default_device
from qtipcli.stages.progress import Silent, Watcher
from qtipcli.stages.tune_blocks import BlockTuner, packed_layer
from qtipcli_kernels.codes import default_lut
from qtipcli_kernels.spec import TrellisSpec

STAGE = "quantize"

MOST_HELDOUT = 64
"""Calibration windows that block tuning never trains on, at most; a fifth where there are few."""

LARGEST_UNSUPPORTED_SHARE = 0.1
"""Share of the blocks' weights that may stay as it is without being asked for: routers and short convolutions, not experts."""


def run(
    source: ModelSource,
    settings: QuantizeSettings,
    hessians: Path,
    directory: Path,
    force: bool = False,
    watcher: Watcher | None = None,
) -> Path:
    """Fill `directory` with the model's rounded layers, going on where an earlier run stopped; returns it.

    hessians: a finished calibrate run directory of the same model.
    Raises MismatchError where either directory holds another job, QtipError where a layer cannot be rounded.
    """
    watcher = watcher or Silent()
    calibration = RunDirectory.load(hessians, calibrate.STAGE)
    model = fingerprint_model(source.directory)
    if calibration.fingerprint["model"] != model:
        raise QtipError(f"{hessians} was calibrated on another model than {source.name}", "give the Hessians of this model")
    fingerprint = {
        "model": model,
        "calibration": fingerprint_text(repr(calibration.settings), repr(calibration.fingerprint)),
        "versions": fingerprint_versions(),
    }
    frozen = settings.model_dump()
    if settings.tune_blocks is None:
        del frozen["tune_blocks"]  # jobs that were started before there was tuning go on
    with interruptible(), RunDirectory.open(directory, STAGE, frozen, fingerprint, force=force) as job:
        stage = _Quantizer(source, settings, calibration, job, watcher)
        stage.run()
    return directory


class _Quantizer:
    """One run of the stage."""

    def __init__(
        self, source: ModelSource, settings: QuantizeSettings, calibration: RunDirectory, job: RunDirectory, watcher: Watcher
    ) -> None:
        self.skeleton = Skeleton(source, device=default_device())
        self.settings, self.calibration, self.job, self.watcher = settings, calibration, job, watcher
        self.luts: dict[TrellisSpec, torch.Tensor | None] = {}
        # Compiled once: an allocation has a pattern for each of what may be thousands of layers.
        self.overrides = [(re.compile(fnmatch.translate(pattern)), value) for pattern, value in settings.layers.items()]
        for note in self.skeleton.notes:
            watcher.note(note)
        _refuse_unsupported(source, self.skeleton)
        self._refuse_unused_patterns()

    def run(self) -> None:
        blocks = range(len(self.skeleton.blocks))
        missing = [index for index in blocks if not self.job.done(block_key(index))]
        self.watcher.begin("quantize", len(blocks), len(blocks) - len(missing))
        if missing and self.settings.tune_blocks is not None:
            self._run_tuned(missing, self.settings.tune_blocks)
            return
        batches: list[BlockInput] = []
        if missing and self.settings.quantized_prefix:
            tokens = self.calibration.read(calibrate.TOKENS)[calibrate.TOKENS]
            rows = max(1, calibrate.BATCH_TOKENS // tokens.shape[1])
            batches = capture_first_inputs(self.skeleton, tokens, rows)
        for index in blocks:
            checkpoint()
            if index in missing:
                self.job.commit(block_key(index), *self._round_block(index, batches))
                self.watcher.advance(self.skeleton.blocks[index][0])
            if missing and self.settings.quantized_prefix and index < missing[-1]:
                self._forward_quantized(index, batches)
            self.skeleton.release(index)

    def _run_tuned(self, missing: list[int], settings: BlockTuning) -> None:
        """Round a block, tune it, and round the next one behind it."""
        tokens = self.calibration.read(calibrate.TOKENS)[calibrate.TOKENS]
        heldout = max(1, min(MOST_HELDOUT, len(tokens) // 5))
        tuner = BlockTuner(self.skeleton, tokens, heldout, settings, self.job.path, self.watcher)
        try:
            for index in range(missing[-1] + 1):
                checkpoint()
                if index not in missing:
                    stored, tuned = self.job.read(block_key(index)), self.job.report(block_key(index))["tuned"]
                    tuner.skip(index, self._stored_layers(index, stored), {name: stored[name] for name in tuned})
                    continue
                tensors, report = self._round_block(index, tuner.inputs() if self.settings.quantized_prefix else ())
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

    def _round_block(self, index: int, batches: Iterable[BlockInput]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """(what the shard holds, its report). batches: the quantized prefix's output, where Hessians are made from it."""
        prefix = self.skeleton.blocks[index][0]
        linears = {f"{prefix}.{name}": linear for name, linear in find_linears(self.skeleton.materialize(index)).items()}
        tensors: dict[str, torch.Tensor] = {}
        layers: dict[str, Any] = {}
        left: dict[str, str] = {}
        for names, tokens, hessian_II in self._hessians(index, batches):
            chosen = [name for name in names if not _matches(name, self.settings.skip)]
            left |= {name: "skipped by the settings" for name in names if name not in chosen}
            if not tokens:
                left |= dict.fromkeys(chosen, "never called in calibration")
                continue
            if not chosen:
                continue
            started = time.monotonic()
            packed = self._round({name: linears[name].weight for name in chosen}, hessian_II)
            seconds = (time.monotonic() - started) / len(chosen)
            for name, matrix in packed.items():
                tensors |= {f"{name}.{part}": tensor for part, tensor in self._stored(name, matrix).items()}
                layers[name] = self._report(name, matrix, linears[name])
                self._announce(name, layers[name], seconds)
        return tensors, {"layers": layers, "left": left}

    def _hessians(self, index: int, batches: Iterable[BlockInput]) -> Iterator[tuple[list[str], int, torch.Tensor]]:
        """(full names of a group, tokens, Hessian float32 [I, I]) for each group of block `index`."""
        groups = self.calibration.report(block_key(index))["groups"]
        if not self.settings.quantized_prefix:
            self.calibration.verify(block_key(index))
            with self.calibration.open_shard(block_key(index)) as shard:
                for group in groups:
                    yield group["names"], group["tokens"], shard.get_tensor(group["names"][0]).to(self.skeleton.device)
            return
        prefix, block = self.skeleton.blocks[index]
        linears = find_linears(block)
        short = [tuple(name.removeprefix(f"{prefix}.") for name in group["names"]) for group in groups]
        known = [InputGroup(names, linears[names[0]].in_features) for names in short]
        with HessianRecorder(block, known) as recorder:
            for batch in batches:
                calibrate.run_block(self.skeleton, index, batch)
        means = recorder.hessians()
        for group, names in zip(groups, short, strict=True):
            hessian_II, tokens = means[names[0]]
            yield group["names"], tokens, hessian_II

    def _round(self, weights: Mapping[str, torch.Tensor], hessian_II: torch.Tensor) -> dict[str, PackedMatrix]:
        for name, weight in weights.items():
            check_finite(f"{name}.weight", weight)
        settings = RoundingSettings(
            Transform.parse(self.settings.transform),
            self.settings.damping,
            self.settings.refit,
            scale=self.settings.scale,
            search=self.settings.search and self.settings.scale is None,
            fast=self.settings.fast,
            seed=self.settings.seed,
        )
        specs = {name: self._spec(name) for name in weights}
        luts = {name: self._lut(spec) for name, spec in specs.items()}
        return round_group(weights, hessian_II, specs, settings, luts)

    def _spec(self, name: str) -> TrellisSpec:
        return self.settings.spec(next((value for pattern, value in self.overrides if pattern.match(name)), None))

    def _lut(self, spec: TrellisSpec) -> torch.Tensor | None:
        if spec not in self.luts:
            self.luts[spec] = default_lut(spec)
        return self.luts[spec]

    def _stored(self, name: str, matrix: PackedMatrix) -> dict[str, torch.Tensor]:
        stored = {"trellis": matrix.trellis, "scale_in": matrix.scale_in, "scale_out": matrix.scale_out}
        lut = self._lut(self._spec(name))
        return stored if lut is None else stored | {"lut": lut}

    def _report(self, name: str, matrix: PackedMatrix, linear: torch.nn.Linear) -> dict[str, Any]:
        """What the ledger keeps of a layer; nothing in it depends on the clock."""
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

    def _forward_quantized(self, index: int, batches: list[BlockInput]) -> None:
        """Take the batches through block `index` as it was stored."""
        block = self.skeleton.materialize(index)
        prefix = self.skeleton.blocks[index][0]
        for name, layer in self._stored_layers(index, self.job.read(block_key(index))).items():
            block.get_submodule(name.removeprefix(f"{prefix}.")).weight.data = layer.to(self.skeleton.device).weight_dense()
        calibrate.forward(self.skeleton, index, batches)

    def _refuse_unused_patterns(self) -> None:
        names = [f"{prefix}.{name}" for prefix, block in self.skeleton.blocks for name in find_linears(block)]
        for pattern in (*self.settings.skip, *self.settings.layers):
            if not fnmatch.filter(names, pattern):
                raise SettingsError(f"no layer is called {pattern!r}", f"names look like {names[0]}; * stands for anything")


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
    """The layout of a layer from what the ledger keeps of it."""
    spec = TrellisSpec(report["code"], report["bits_per_step"], report["state_bits"], report["weights_per_step"])
    transform = Transform.parse(report["transform"])
    rows, columns = report["shape"]
    return PackedLayout(columns, rows, spec, transform, transform, report["bias"])


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _refuse_unsupported(source: ModelSource, skeleton: Skeleton) -> None:
    """Raise QtipError, naming them, where more of the blocks' weights than a router's would be left as they are."""
    total = found = 0
    first = ""
    for prefix, block in skeleton.blocks:
        sizes = {name: parameter.numel() for name, parameter in block.named_parameters()}
        total += sum(sizes.values())
        for name, why in unsupported(block):
            found += sizes[name]
            first = first or f"{prefix}.{name} ({why})"
    if found > LARGEST_UNSUPPORTED_SHARE * total:
        raise QtipError(
            f"{100 * found / total:.0f} % of the weights of {source.name} are not in linear layers, such as {first}",
            "this version quantizes torch.nn.Linear only; fused experts and Conv1D are not supported yet",
        )
