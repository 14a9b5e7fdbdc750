"""Owns what --dry-run does: each command's plan, from headers, the text and a measurement of seconds. Nothing is written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qtipcli import config
from qtipcli.config import BlockTuning, CalibrationSettings, QuantizeSettings, settings_from
from qtipcli.data.text import CALIBRATION_DATA, load_documents
from qtipcli.errors import QtipError
from qtipcli.job.directory import RunDirectory
from qtipcli.model.imagined import Imagined
from qtipcli.model.linears import InputGroup, find_linears
from qtipcli.model.source import ModelSource
from qtipcli.nn.layout import PackedLayout
from qtipcli.stages import calibrate, forward_rates, memory, outer, plan, quantize, rates, rounding_rates, tuning_rates
from qtipcli.stages.calibrate import TOKENS, block_key, load_tokenizer
from qtipcli.stages.fitting import Fit, fit
from qtipcli.stages.load import default_device
from qtipcli.stages.memory import EARLY, FLOAT, Sizes, Text
from qtipcli.stages.own_process import age_seconds, peak_bytes, resident_bytes, settled_bytes
from qtipcli.stages.plan import TEXT, WRITE_BYTES_PER_S, LayerKind, Plan
from qtipcli.stages.rates import Passes
from qtipcli.stages.rounding_rates import Group
from qtipcli.stages.slices import DEFAULT_SLICES
from qtipcli.stages.stored_layers import layout_of
from qtipcli.stages.streams import DEFAULT_MEMORY_GIB
from qtipcli.stages.tune_blocks import MICRO_TOKENS
from qtipcli.stages.tuning_rates import TUNING_SECONDS, TuningText
from qtipcli.tune.descent import largest_divisor
from qtipcli_kernels.spec import TrellisSpec

GROUPING_TOKENS = 16
"""Tokens of the pass that finds which layers share an input."""

NOT_COUNTED = "config.json, qtip.json and README.md are not counted: their size depends on figures that only a run gives"


def of_calibrate(
    source: ModelSource, settings: CalibrationSettings, directory: Path, head: bool = False, two_sided: bool = False
) -> Plan:
    """The plan of calibrate.run. Raises what it raises of model, settings and local text."""
    wanted = QuantizeSettings(two_sided=two_sided, quantized_prefix=False)
    job = _Job(source, settings.model_dump(), wanted, directory, head=head)
    return Plan(
        command="calibrate",
        model=source.name,
        layers=job.hessian_kinds(),
        stored=None,
        **job.on_devices(job.calibrate_phases()),
        disk=job.hessian_disk(),
        seconds=job.start_seconds() | job.calibrate_seconds(),
        notes=tuple(job.notes),
    )


def of_quantize(
    source: ModelSource,
    calibration: Mapping[str, Any],
    settings: QuantizeSettings,
    hessians: Path,
    job_directory: Path,
    pack_after: bool = True,
) -> Plan:
    """The plan of pipeline.quantize_model. calibration: the fields of CalibrationSettings that the user asked for."""
    skeleton = Imagined(source)
    packed, left = plan.layouts_of(skeleton, settings)
    stored, tensors = plan.stored_of(skeleton, packed)
    kinds = plan.kinds_of(skeleton, packed, left, tensors)
    del skeleton, tensors
    head = settings.head_bits is not None or settings.embedding_bits is not None
    job = _Job(source, calibration, settings, hessians, packed, head, job_directory)
    phases = {} if job.is_calibrated else job.calibrate_phases()
    phases |= job.quantize_phases()
    seconds = job.start_seconds() | ({} if job.is_calibrated else job.calibrate_seconds()) | job.quantize_seconds()
    disk = ({} if job.is_calibrated else job.hessian_disk()) | {
        "quantize job": sum(layout.stored_bits // 8 for layout in packed.values())
    }
    if pack_after:
        phases["pack"] = stored.weights // stored.files + job.sizes.read
        seconds["pack"] = 2 * stored.weights / WRITE_BYTES_PER_S
        disk["packed directory"] = stored.weights + stored.index + stored.copied
    job.notes.append(NOT_COUNTED)
    return Plan(
        command="quantize",
        model=source.name,
        layers=kinds,
        stored=stored,
        **job.on_devices(phases),
        disk=disk,
        seconds=seconds,
        notes=tuple(job.notes),
    )


def fit_calibrate(
    source: ModelSource, settings: CalibrationSettings, directory: Path, head: bool, two_sided: bool, limit: int
) -> Fit:
    """What calibrate.run is to hold in memory so that the process stays below `limit` bytes. Raises as `fitting.fit` does."""
    job = _Job(
        source, settings.model_dump(), QuantizeSettings(two_sided=two_sided, quantized_prefix=False), directory, head=head
    )
    return fit(lambda memory_gib: job.on_devices(job.calibrate_phases(memory_gib)), limit, job.device)


def fit_quantize(
    source: ModelSource,
    calibration: Mapping[str, Any],
    settings: QuantizeSettings,
    hessians: Path,
    job_directory: Path,
    limit: int,
) -> Fit:
    """The same of pipeline.quantize_model."""
    skeleton = Imagined(source)
    packed, _ = plan.layouts_of(skeleton, settings)
    stored, _ = plan.stored_of(skeleton, packed)
    del skeleton
    head = settings.head_bits is not None or settings.embedding_bits is not None
    job = _Job(source, calibration, settings, hessians, packed, head, job_directory)

    def phases(memory_gib: float) -> dict[str, dict[str, int]]:
        found = {} if job.is_calibrated else job.calibrate_phases(memory_gib)
        found |= job.quantize_phases(memory_gib) | {"pack": stored.weights // stored.files}
        return job.on_devices(found)

    return fit(phases, limit, job.device)


def of_pack(source: ModelSource, directory: Path, max_shard_size: str = "5GB") -> Plan:
    """The plan of pack.run. Raises QtipError where the job is not finished."""
    job = RunDirectory.load(directory, quantize.STAGE)
    skeleton = Imagined(source)
    packed: dict[str, PackedLayout] = {}
    left: dict[str, str] = {}
    for key in (*(block_key(index) for index in range(len(skeleton.blocks))), *outer.shard_keys(job.settings)):
        if not job.done(key):
            raise QtipError(f"{directory} is not finished: {key} is missing", "give the quantize command again")
        report = job.report(key)
        packed |= {name: layout_of(layer) for name, layer in report["layers"].items()}
        left |= report["left"]
    stored, tensors = plan.stored_of(skeleton, packed, max_shard_size)
    largest = min(stored.weights, config.parse_size(max_shard_size))
    return Plan(
        command="pack",
        model=source.name,
        layers=plan.kinds_of(skeleton, packed, left, tensors),
        stored=stored,
        ram={"pack": resident_bytes() + largest},
        vram={},
        disk={"packed directory": stored.weights + stored.index + stored.copied},
        seconds={"start": age_seconds(), "pack": 2 * stored.weights / WRITE_BYTES_PER_S},
        notes=(NOT_COUNTED,),
    )


@dataclass(frozen=True)
class _Kind:
    """Blocks that are alike. indices: of them. groups: of their linears. passes: of one token."""

    indices: tuple[int, ...]
    groups: tuple[InputGroup, ...]
    passes: Passes


class _Job:
    """What is known of a job beforehand: text, sizes, and rates on this machine."""

    def __init__(
        self,
        source: ModelSource,
        calibration: Mapping[str, Any],
        settings: QuantizeSettings,
        hessians: Path,
        packed: Mapping[str, PackedLayout] | None = None,
        head: bool = False,
        directory: Path | None = None,
    ) -> None:
        self.source, self.settings, self.head = source, settings, head
        self.notes: list[str] = []
        self.counted: dict[tuple[Group, TrellisSpec], int] = {}
        self.device = default_device()
        self.imports = age_seconds()
        self.packed = packed
        self.done = _done_blocks(directory)
        self.is_calibrated, self.text, tokens = self._text(calibration, hessians)
        self.reading = peak_bytes()
        skeleton = Imagined(source, device=self.device)
        self.notes += skeleton.notes
        self.sizes = sizes_of(skeleton)
        self.start = age_seconds()
        self._measure(skeleton, tokens)

    def _text(self, asked: Mapping[str, Any], hessians: Path) -> tuple[bool, Text, torch.Tensor]:
        """(whether the Hessians are there, the text, token ids of a batch of it)."""
        if (hessians / "job.json").is_file():
            found = RunDirectory.load(hessians, calibrate.STAGE)
            there = found.settings | {"slices": calibrate.slices_of(found)}
            settings = settings_from(CalibrationSettings, {**there, **asked})
            complete = found.done(TOKENS) and (not self.settings.two_sided or calibrate.has_output_side(found))
            if complete and settings.model_dump() == there:
                self.notes.append(f"the Hessians in {hessians} are used")
                tokens = found.read(TOKENS)[TOKENS]
                return True, Text(*tokens.shape, calibrate.slices_of(found)), tokens
            self.notes.append(f"what is done already in {hessians} is not taken off")
        settings = settings_from(CalibrationSettings, dict(asked))
        data = settings.data or CALIBRATION_DATA
        tokenizer = load_tokenizer(self.source)
        if not load_documents(data, tokenizer).streamed:
            tokens = calibrate.load_windows(self.source, settings).tokens
            return False, Text(*tokens.shape, settings.slices or DEFAULT_SLICES), tokens
        self.notes.append(f"{data} is not read: {settings.samples} windows of it are taken to be there")
        context = calibrate.context_of(self.source, settings.context)
        text = Text(settings.samples, context, settings.slices or DEFAULT_SLICES)
        tokens = torch.randint(len(tokenizer), (min(settings.samples, text.batch // context), context))
        return False, text, tokens

    def _measure(self, skeleton: Imagined, tokens: torch.Tensor) -> None:
        """Run one block of each kind, and the rounding."""
        alike = rates.alike(skeleton)
        rows = tokens[: max(1, self.text.batch // self.text.context)]
        prefix = self.settings.quantized_prefix and self.packed is not None
        self.kinds = []
        for indices in alike:
            groups = tuple(rates.find_groups(skeleton, indices[0], rows[:1, :GROUPING_TOKENS]))
            share = len(alike)
            passes = rates.measure_passes(skeleton, indices[0], groups, rows, self.settings.two_sided, prefix, share)
            self.kinds.append(_Kind(indices, groups, passes))
        self.early = settled_bytes()
        self.names = [name for name, _ in skeleton.blocks]
        self.linears = {
            f"{name}.{layer}": (linear.out_features, linear.in_features)
            for name, block in skeleton.blocks
            for layer, linear in find_linears(block).items()
        }
        self.output_seconds: dict[int, float] = {}
        self.output_bytes: dict[int, int] = {}
        if self.settings.two_sided:
            for outputs in {shape[0] for shape in self.linears.values()}:
                self.output_bytes[outputs] = rounding_rates.output_side_bytes(outputs, self.device)
                self.output_seconds[outputs] = rounding_rates.output_side_seconds(outputs, self.device)
        if self.settings.tune_blocks is not None and self.packed is not None:
            self._measure_tuning(skeleton, self.settings.tune_blocks)
        self.encoders: dict[TrellisSpec, float] = {}
        self.rounding = None
        if self.packed is not None:
            for spec in {layout.spec for layout in self.packed.values()}:
                self.encoders[spec] = rounding_rates.encoder_rate(spec, self.settings.fast, self.device)
            self.rounding = rounding_rates.rounding_rates(self.settings, self.device)
        self.resident = settled_bytes()

    def _measure_tuning(self, skeleton: Imagined, settings: BlockTuning) -> None:
        """Train one block of each kind, on as many tokens at once as the stage does."""
        assert self.packed is not None, "only a job that quantizes tunes"
        heldout = quantize.heldout_of(self.text.rows)
        piece = largest_divisor(settings.batch, MICRO_TOKENS // self.text.context)
        self.tuned = TuningText(self.text.rows - heldout, heldout, self.text.context, settings.epochs, settings.batch, piece)
        inside = {name: layout for name, layout in self.packed.items() if name in self.linears}
        self.tuning = tuning_rates.measure_tuning(skeleton, inside, settings, piece, self.text.context)
        self.forward = forward_rates.measure_forward(skeleton, piece, self.text.context, TUNING_SECONDS / 3)

    def _groups(self, kind: _Kind, index: int, packed_only: bool = False) -> list[tuple[Group, list[str]]]:
        """The groups of block `index` with the full names of their layers."""
        found = []
        for group in kind.groups:
            names = [f"{self.names[index]}.{name}" for name in group.names]
            if packed_only and self.packed is not None:
                names = [name for name in names if name in self.packed]
            if names:
                found.append((Group(tuple(self.linears[name][0] for name in names), group.in_features), names))
        return found

    def _largest(self) -> _Kind:
        return max(self.kinds, key=lambda kind: sum(group.weights for group, _ in self._groups(kind, kind.indices[0])))

    def calibrate_phases(self, memory_gib: float = DEFAULT_MEMORY_GIB) -> dict[str, int]:
        kind = self._largest()
        groups = [group for group, _ in self._groups(kind, kind.indices[0])]
        return memory.calibrate_phases(
            self.sizes, self.text, kind.passes, groups, self.output_bytes, self.settings.two_sided, memory_gib
        )  # fmt: skip

    def quantize_phases(self, memory_gib: float = DEFAULT_MEMORY_GIB) -> dict[str, int]:
        kind = self._largest()
        groups = [(group, names) for group, names in self._groups(kind, kind.indices[0], packed_only=True)]
        specs = [self._spec(names) for _, names in groups]
        needed = [self._rounding_bytes(group, spec) for (group, _), spec in zip(groups, specs, strict=True)]
        shapes = [group for group, _ in groups]
        stem = f"{self.names[kind.indices[0]]}."
        changed = [any(name.removeprefix(stem) in kind.passes.changed for name in names) for _, names in groups]
        prefix = self.settings.quantized_prefix
        found = memory.quantize_phases(self.sizes, self.text, kind.passes, shapes, needed, prefix, changed, memory_gib)
        if self.settings.tune_blocks is not None:
            kept = memory.kept_of(self.text, self.sizes, kind.passes, memory_gib) if prefix else 0
            masters = tuning_rates.masters_bytes(self._packed_in(kind.indices[0]))
            tuning = memory.block_tuning_phases(self.sizes, self.tuned, self.tuning, self.forward.peak, masters)
            found |= {phase: size + kept for phase, size in tuning.items()}
        plain = self.settings.model_copy(update={"quantized_prefix": False, "two_sided": False})
        for name, layout in self._outside().items():
            group = Group((layout.out_features,), layout.in_features)
            found[f"quantize, {name}"] = rounding_rates.rounding_bytes(group, plain, layout.spec, self.device)
        return found

    def _rounding_bytes(self, group: Group, spec: TrellisSpec) -> int:
        """Counted once for each shape."""
        if (group, spec) not in self.counted:
            self.counted[group, spec] = rounding_rates.rounding_bytes(group, self.settings, spec, self.device)
        return self.counted[group, spec]

    def calibrate_seconds(self) -> dict[str, float]:
        """Of the calibrate stage."""
        found = {"calibrate": sum(len(kind.indices) * kind.passes.calibrate for kind in self.kinds) * self.text.tokens}
        if self.settings.two_sided:
            tokens = self.text.rows_back * self.text.context
            seconds = sum(len(kind.indices) * kind.passes.output_side for kind in self.kinds) * tokens
            seconds += sum(self.output_seconds[rows] for rows, _ in self.linears.values())
            seconds += rates.head_seconds(self.sizes.token // FLOAT, self.sizes.vocabulary, self.device) * tokens
            found["output side"] = seconds
        return found

    def quantize_seconds(self) -> dict[str, float]:
        """Of the quantize stage, for the blocks that are not done."""
        assert self.rounding is not None, "a job that quantizes has measured the rounding"
        total = 0.0
        for kind in self.kinds:
            for index in kind.indices:
                total += kind.passes.prefix * self.text.tokens
                if block_key(index) in self.done:
                    continue
                for group, names in self._groups(kind, index, packed_only=True):
                    total += self.rounding.seconds(group, self.encoders[self._spec(names)])
        for layout in self._outside().values():
            group = Group((layout.out_features,), layout.in_features)
            total += self.rounding.seconds(group, self.encoders[layout.spec])
        if self.done:
            self.notes.append(f"{len(self.done)} blocks are rounded already and taken off the time")
        found = {"quantize": total}
        if self.settings.tune_blocks is not None:
            share = 1 - len(self.done) / len(self.names)
            each = self.forward.block / (self.tuned.piece * self.tuned.context)
            found["tune blocks"] = share * tuning_rates.block_tuning_seconds(self.tuned, self.tuning, each)
        return found

    def start_seconds(self) -> dict[str, float]:
        """Imports, and the text."""
        return {"start": self.start}

    def hessian_disk(self) -> dict[str, int]:
        """Bytes of the calibrate stage's tensors: exact, but for headers and the ledger."""
        size = self.text.tokens * torch.int64.itemsize
        for kind in self.kinds:
            for index in kind.indices:
                for group, _ in self._groups(kind, index):
                    size += FLOAT * group.inputs**2
                    size += sum(FLOAT * each**2 for each in group.outputs) if self.settings.two_sided else 0
        size += self.sizes.token**2 // FLOAT if self.head else 0
        streams = (self.sizes.blocks + 1) * self.text.rows_back * self.text.context * self.sizes.token
        in_file = self.settings.two_sided and memory.held(streams, 0) == 0
        return {"Hessians": size} | ({"activations, while it runs": streams} if in_file else {})

    def hessian_kinds(self) -> tuple[LayerKind, ...]:
        """What the calibrate stage stores, as rows of the table."""
        found: dict[tuple[str, tuple[int, int]], int] = {}
        for kind in self.kinds:
            for index in kind.indices:
                for group, names in self._groups(kind, index):
                    keys = [(f"input of {', '.join(names)}", (group.inputs, group.inputs))]
                    if self.settings.two_sided:
                        keys += [(f"output of {name}", (self.linears[name][0],) * 2) for name in names]
                    for name, shape in keys:
                        key = (plan.starred(name), shape)
                        found[key] = found.get(key, 0) + 1
        return tuple(
            LayerKind(name, count, shape, None, "float32", count * FLOAT * math.prod(shape))
            for (name, shape), count in sorted(found.items(), key=lambda item: -item[1] * math.prod(item[0][1]))
        )

    def on_devices(self, phases: Mapping[str, int]) -> dict[str, dict[str, int]]:
        """{"ram", "vram"}: on a GPU everything but the process itself and what waits between blocks is there."""
        with_reading = {phase: size + self.sizes.reading(phase) for phase, size in phases.items()}
        if self.device.type == "cpu":
            ram = {phase: size + (self.early if phase in EARLY else self.resident) for phase, size in with_reading.items()}
            return {"ram": {TEXT: self.reading} | ram, "vram": {}}
        waiting = self.text.tokens * (2 * self.sizes.token + int(self._largest().passes.kept_bytes))
        self.notes.append(plan.ON_GPU)
        ram = {phase: self.resident + min(size, waiting) for phase, size in with_reading.items()}
        return {"ram": {TEXT: self.reading} | ram, "vram": {phase: max(0, size - waiting) for phase, size in phases.items()}}

    def _spec(self, names: Sequence[str]) -> TrellisSpec:
        """The trellis of a group; where its layers have several, the one that takes longest."""
        assert self.packed is not None, "asked of jobs that quantize"
        return min((self.packed[name].spec for name in names), key=lambda spec: self.encoders[spec])

    def _packed_in(self, index: int) -> list[PackedLayout]:
        return [layout for name, layout in (self.packed or {}).items() if name.startswith(f"{self.names[index]}.")]

    def _outside(self) -> dict[str, PackedLayout]:
        return {name: layout for name, layout in (self.packed or {}).items() if name not in self.linears}


def sizes_of(skeleton: Imagined) -> Sizes:
    """What of the model decides about memory."""
    model = skeleton.model
    sizes = {name: FLOAT * parameter.numel() for name, parameter in model.named_parameters()}
    head_module, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    head = next((f"{name}.weight" for name, module in model.named_modules() if module is head_module), "")
    blocks = [
        (
            sum(FLOAT * parameter.numel() for parameter in block.parameters()),
            sum(FLOAT * linear.weight.numel() for linear in find_linears(block).values()),
        )
        for _, block in skeleton.blocks
    ]
    names = [name for name in skeleton.outer_names if name in sizes]
    source = skeleton.source
    read = {name: math.prod(source.shape(name)) * source.dtype(name).itemsize for name in source.tensor_names}
    # Under their names in the checkpoint; where those are others, any tensor may be a block's.
    inside = [size for name, size in read.items() if any(f"{block}." in name for block, _ in skeleton.blocks)]
    return Sizes(
        blocks=len(blocks),
        block=max(block for block, _ in blocks),
        linears=max(linears for _, linears in blocks),
        outer=sum(sizes[name] for name in names if name != head),
        head=sizes.get(head, 0) if head in names else 0,
        token=FLOAT * embedding.weight.shape[-1],
        vocabulary=embedding.weight.shape[0],
        read=max(read.values()),
        block_read=max(inside or read.values()),
    )


def _done_blocks(directory: Path | None) -> set[str]:
    """The blocks that a quantize job has rounded already."""
    if directory is None or not (directory / "job.json").is_file():
        return set()
    return set(calibrate.block_keys(RunDirectory.load(directory, quantize.STAGE)))
