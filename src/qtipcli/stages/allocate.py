"""Owns the allocate stage: which rate each layer gets within a budget, and whether that was better than the uniform model.

The run directory holds two empty shards: `table` reports the decision, before anything is rounded, and `verdict` what both
finished jobs are worth on held-out windows. In between they are ordinary quantize jobs: the table becomes a QuantizeSettings
with an override for each layer. What is counted is what `qtip pack` stores, tensor by tensor.
"""

from __future__ import annotations

import fnmatch
import glob
import math
from collections.abc import Mapping, Set
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from torch import Tensor

from qtipcli.config import AllocationSettings, LayerSettings, QuantizeSettings, settings_from
from qtipcli.job.directory import RunDirectory
from qtipcli.job.fingerprint import fingerprint_text, fingerprint_versions
from qtipcli.job.interrupt import interruptible
from qtipcli.job.processes import ALONE, Processes
from qtipcli.job.shared import SharedDirectory
from qtipcli.model.linears import find_linears
from qtipcli.model.skeleton import Skeleton
from qtipcli.model.source import ModelSource
from qtipcli.nn.layout import PackedLayout
from qtipcli.quant.allocation import Choice, allocate, largest_bytes
from qtipcli.quant.transform import Transform
from qtipcli.stages import calibrate, outer, sensitivity
from qtipcli.stages.calibrate import block_key
from qtipcli.stages.divergence import Reference
from qtipcli.stages.progress import Watcher
from qtipcli.stages.sensitivity import spec_name
from qtipcli.stages.stored_layers import layout_of
from qtipcli.stages.tune_blocks import packed_layer
from qtipcli_kernels.spec import TrellisSpec

STAGE = "allocate"
TABLE, VERDICT = "table", "verdict"
ALLOCATED, UNIFORM = "allocated", "uniform"


@dataclass(frozen=True)
class Layer:
    """One linear that may be packed: its sizes, and whether it has a bias."""

    rows: int
    columns: int
    bias: bool

    def bytes(self, spec: TrellisSpec, transform: Transform) -> int:
        """Stored bytes of trellis, scales and table."""
        return PackedLayout(self.columns, self.rows, spec, transform, transform, self.bias).stored_bits // 8


@dataclass(frozen=True)
class Budget:
    """What may be chosen, and within which bytes.

    free: layers that the allocation decides about. specs: what each of them may be. fixed_bytes: everything else that is
    stored: tensors that are not packed, biases, and layers whose settings the user gave. limit: bytes of it all.
    """

    free: dict[str, Layer]
    specs: list[TrellisSpec]
    transform: Transform
    fixed_bytes: int
    limit: int

    @classmethod
    def of(
        cls, skeleton: Skeleton, layers: Mapping[str, Layer], quantize: QuantizeSettings, settings: AllocationSettings
    ) -> Budget:
        """layers: every linear that the quantize stage packs unless it is skipped."""
        transform = Transform.parse(quantize.transform)
        packed = {name: layer for name, layer in layers.items() if not _first_match(name, quantize.skip)}
        patterns = {name: _first_match(name, tuple(quantize.layers)) for name in packed}
        fixed = {name: quantize.spec(quantize.layers[pattern]) for name, pattern in patterns.items() if pattern is not None}
        free = {name: layer for name, layer in packed.items() if name not in fixed}
        outside = outer.plan(skeleton, quantize)
        fixed_bytes = _unpacked_bytes(skeleton, packed.keys() | outside.keys())
        fixed_bytes += sum(matrix.bytes(transform) for matrix in outside.values())
        fixed_bytes += sum(packed[name].bytes(spec, transform) for name, spec in fixed.items())
        specs = sensitivity.candidates(quantize, settings.sensitivity())
        if settings.size is not None:
            return cls(free, specs, transform, fixed_bytes, settings.size)
        average = settings.bits if settings.bits is not None else quantize.bits
        return cls(free, specs, transform, fixed_bytes, fixed_bytes + _average_bytes(free, specs[0], transform, average))

    def uniform_bytes(self, spec: TrellisSpec) -> int:
        """Everything that is stored, with all free layers alike."""
        return self.fixed_bytes + sum(layer.bytes(spec, self.transform) for layer in self.free.values())

    def best_uniform(self) -> TrellisSpec:
        """The highest rate at which all free layers alike fit; the job's own code where two codes have it."""
        return max((spec for spec in self.specs if self.uniform_bytes(spec) <= self.limit), key=lambda spec: spec.bits)

    def choices(self, losses: Mapping[str, Mapping[str, float]]) -> list[list[Choice]]:
        """Of every free layer, in the order of `specs`. losses: layer -> name of the trellis -> what it adds to the loss."""
        return [
            [Choice(layer.bytes(spec, self.transform), losses[name][spec_name(spec)]) for spec in self.specs]
            for name, layer in self.free.items()
        ]


def check(source: ModelSource, quantize: QuantizeSettings, settings: AllocationSettings) -> None:
    """Raise SettingsError, naming the smallest size, where nothing can fit; before anything is calibrated or measured."""
    budget_of(Skeleton(source), quantize, settings)


def budget_of(skeleton: Skeleton, quantize: QuantizeSettings, settings: AllocationSettings) -> Budget:
    """What the model's layers may be given. Raises SettingsError, naming the smallest size, where nothing can fit."""
    layers = {
        f"{prefix}.{name}": Layer(linear.out_features, linear.in_features, linear.bias is not None)
        for prefix, block in skeleton.blocks
        for name, linear in find_linears(block).items()
    }
    budget = Budget.of(skeleton, layers, quantize, settings)
    nothing = dict.fromkeys(layers, dict.fromkeys(map(spec_name, budget.specs), 0.0))
    allocate(budget.choices(nothing), budget.limit, budget.fixed_bytes)
    return budget


def decide(
    source: ModelSource,
    quantize: QuantizeSettings,
    settings: AllocationSettings,
    hessians: Path,
    sensitivities: Path,
    directory: Path,
    force: bool,
    watcher: Watcher,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """The table, from `directory` where it was decided before.

    Returns {"layers": name -> "BITS:CODE", "uniform": "BITS:CODE", "bytes", "predicted_kl": of both, "budget", "fixed_bytes"}.
    Raises SettingsError where nothing fits, MismatchError where `directory` holds another job.
    """
    measured = RunDirectory.load(sensitivities, sensitivity.STAGE)
    fingerprint = {
        "model": measured.fingerprint["model"],
        "sensitivities": fingerprint_text(repr(measured.settings), repr(measured.fingerprint)),
        "versions": fingerprint_versions(),
    }
    frozen = {"quantize": quantize.model_dump(), "allocate": settings.model_dump()}
    with (
        interruptible(notice=processes.is_main),
        SharedDirectory.join(processes, directory, STAGE, frozen, fingerprint, force) as job,
    ):
        if not job.done(TABLE):
            rows = sensitivity.rows(measured, RunDirectory.load(hessians, calibrate.STAGE))
            job.commit(TABLE, {}, _decide(Skeleton(source), rows, quantize, settings))
        table = job.report(TABLE)
    if table["largest_bytes"] < table["budget"]:
        watcher.note(
            f"every layer has its best rate at {table['largest_bytes']:,} bytes: of the {table['budget']:,} asked for the rest "
            "is left unused"
        )
    return table


def settings_of(table: Mapping[str, Any], quantize: QuantizeSettings, which: str) -> QuantizeSettings:
    """The settings of one of the two jobs: ALLOCATED, with an override a layer, or UNIFORM, with one for all.

    The user's own overrides stand before them, so that they win.
    """
    patterns = {"*": table["uniform"]}
    if which == ALLOCATED:
        patterns = {glob.escape(name): text for name, text in table["layers"].items()}
    overrides = {pattern: _override(text) for pattern, text in patterns.items()}
    return settings_from(QuantizeSettings, quantize.model_dump() | {"layers": {**_dumped(quantize), **overrides}})


def is_uniform(table: Mapping[str, Any]) -> bool:
    """Whether the best allocation is the uniform model, so that there is nothing to compare."""
    return all(text == table["uniform"] for text in table["layers"].values())


def judge(
    source: ModelSource,
    sensitivities: Path,
    jobs: Mapping[str, Path],
    directory: Path,
    watcher: Watcher,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """What the finished quantize jobs `jobs` are worth, from `directory` where it was measured before.

    jobs: ALLOCATED and UNIFORM -> run directory. Both decode to weights that are put into the original, as they are stored.
    Returns {"kl": mean KL(original || each) in nats, "kl_stderr", "windows", "kept": the one with less}.
    """
    before = RunDirectory.load(directory, STAGE)
    with (
        interruptible(notice=processes.is_main),
        SharedDirectory.join(processes, directory, STAGE, before.settings, before.fingerprint) as job,
    ):
        if not job.done(VERDICT):
            measured = RunDirectory.load(sensitivities, sensitivity.STAGE)
            found: dict[str, Tensor] = {}
            own = list(jobs.items())[processes.rank :: processes.world]
            if own:
                reference = Reference(
                    source, measured.read(sensitivity.TOKENS)[sensitivity.JUDGE_TOKENS], watcher, processes.poll
                )
                watcher.begin("compare", len(own))
                for which, path in own:
                    _put(reference, RunDirectory.load(path), processes)
                    found[which] = reference.divergence()
                    watcher.advance(which)
            job.commit(VERDICT, {}, _verdict({which: kl for part in processes.collect(found) for which, kl in part.items()}))
        return job.report(VERDICT)


def _decide(
    skeleton: Skeleton, rows: Mapping[str, Mapping[str, Any]], quantize: QuantizeSettings, settings: AllocationSettings
) -> dict[str, Any]:
    layers = {name: Layer(*row["shape"], row["bias"]) for name, row in rows.items()}
    budget = Budget.of(skeleton, layers, quantize, settings)
    losses = {name: {spec: row["sensitivity"] * loss for spec, loss in row["losses"].items()} for name, row in rows.items()}
    choices = budget.choices(losses)
    taken = allocate(choices, budget.limit, budget.fixed_bytes)
    chosen = {name: spec_name(budget.specs[index]) for name, index in zip(budget.free, taken, strict=True)}
    uniform = budget.best_uniform()
    spent = sum(each[index].bytes for each, index in zip(choices, taken, strict=True))
    return {
        "layers": chosen,
        "uniform": spec_name(uniform),
        "budget": budget.limit,
        "fixed_bytes": budget.fixed_bytes,
        "largest_bytes": budget.fixed_bytes + largest_bytes(choices),
        "bytes": {ALLOCATED: budget.fixed_bytes + spent, UNIFORM: budget.uniform_bytes(uniform)},
        "predicted_kl": {
            ALLOCATED: sum(losses[name][text] for name, text in chosen.items()),
            UNIFORM: sum(losses[name][spec_name(uniform)] for name in budget.free),
        },
    }


def _verdict(found: Mapping[str, Tensor]) -> dict[str, Any]:
    """found: ALLOCATED and UNIFORM -> KL of each window, float64 [W]."""
    means = {which: float(kl_W.mean()) for which, kl_W in found.items()}
    windows = len(found[ALLOCATED])
    errors = {which: float(kl_W.std()) / math.sqrt(windows) if windows > 1 else None for which, kl_W in found.items()}
    kept = ALLOCATED if means[ALLOCATED] <= means[UNIFORM] else UNIFORM
    return {"kl": means, "kl_stderr": errors, "windows": windows, "kept": kept}


def _put(reference: Reference, job: RunDirectory, processes: Processes) -> None:
    """Give the model the weights that a finished quantize job stands for, and the vectors that it tuned."""
    for index in range(len(reference.skeleton.blocks)):
        processes.poll()
        report, tensors = job.report(block_key(index)), job.read(block_key(index))
        for name, layer in report["layers"].items():
            layout = layout_of(layer)
            parts = {part: tensors[f"{name}.{part}"] for part in layout.tensors() if f"{name}.{part}" in tensors}
            dense = packed_layer(layout, parts).to(reference.skeleton.device).weight_dense()
            reference.change({f"{name}.weight": dense})
        reference.change({name: tensors[name] for name in report.get("tuned", ())})


def _average_bytes(layers: Mapping[str, Layer], spec: TrellisSpec, transform: Transform, bits: float) -> int:
    """Bytes, rounded down, of a uniform model with the code of `spec`, were there a rate of `bits`.

    Walks in proportion, scales and tables whole.
    """
    total = Fraction(0)
    for layer in layers.values():
        layout = PackedLayout(layer.columns, layer.rows, spec, transform, transform)
        payload = Fraction(layout.padded_in * layout.padded_out)
        total += layout.stored_bits + payload * (Fraction(repr(bits)) - Fraction(spec.bits))
    return math.floor(total / 8)


def _unpacked_bytes(skeleton: Skeleton, packed: Set[str]) -> int:
    """Bytes of every stored tensor but the weights of the layers in `packed`, as `qtip pack` stores them."""
    names = [name for name in skeleton.model.state_dict() if name not in skeleton.tied and skeleton.holds(name)]
    return sum(skeleton.read(name).nbytes for name in names if not (name.endswith(".weight") and name[:-7] in packed))


def _first_match(name: str, patterns: tuple[str, ...]) -> str | None:
    return next((pattern for pattern in patterns if fnmatch.fnmatchcase(name, pattern)), None)


def _override(text: str) -> dict[str, Any]:
    bits, _, code = text.partition(":")
    return LayerSettings(bits=float(bits), code=code).model_dump()


def _dumped(quantize: QuantizeSettings) -> dict[str, Any]:
    return {pattern: override.model_dump() for pattern, override in quantize.layers.items()}
