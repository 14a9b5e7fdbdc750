"""Owns what `qtip finetune --dry-run` does: what is trained, and the memory, disk and time of tuning by block and end to end.

Of the packed directory headers and vectors (scales, norms, biases, tables) are read, of the original headers alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qtipcli.config import FinetuneSettings, TuningSettings
from qtipcli.data.text import CALIBRATION_DATA, load_documents
from qtipcli.hub.config import METHOD
from qtipcli.model.imagined import Imagined
from qtipcli.model.source import ModelSource
from qtipcli.nn import swap
from qtipcli.stages import blockwise, calibrate, distill, finetune, forward_rates, memory, pack, plan, tuning_rates
from qtipcli.stages.dry_run import sizes_of
from qtipcli.stages.forward_rates import FORWARD_SECONDS
from qtipcli.stages.load import default_device
from qtipcli.stages.memory import FLOAT
from qtipcli.stages.own_process import age_seconds, peak_bytes, settled_bytes
from qtipcli.stages.packed import PackedDirectory
from qtipcli.stages.plan import LOAD_BYTES_PER_S, TEXT, WRITE_BYTES_PER_S, Plan, Stored
from qtipcli.stages.progress import Silent
from qtipcli.stages.tune_blocks import MICRO_TOKENS
from qtipcli.stages.tuning_rates import TUNING_SECONDS, Tuning, TuningText, tuned_bytes
from qtipcli.tune.descent import largest_divisor
from qtipcli.tune.parameters import Rates, Trained

BY_BLOCK, END = "by block", "end to end"
"""The kinds of tuning."""


def of_finetune(source: ModelSource, packed: Path, settings: FinetuneSettings, out: Path, memory_gib: float) -> Plan:
    """The plan of finetune.run in one process. Raises what it raises of settings, directory and local text."""
    finetune.refuse(settings, packed, out)
    job = _Job(source, packed, settings, memory_gib)
    start = age_seconds()
    job.measure()
    return Plan(
        command="finetune",
        model=str(packed),
        layers=(),
        stored=job.stored(),
        **job.on_devices(),
        disk=job.disk(),
        seconds={"start": start} | job.seconds(),
        notes=tuple(job.notes),
        tables=job.tables(),
    )


@dataclass(frozen=True, slots=True)
class _Masters:
    """What is trained by one kind of tuning. shapes: name -> shape, of those that share one parameter the first name.

    names: of all stored tensors that change. stored: their bytes.
    """

    shapes: Mapping[str, tuple[int, ...]]
    names: int
    stored: int

    @property
    def parameters(self) -> int:
        """Numbers that are trained."""
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())

    @property
    def in_memory(self) -> int:
        """Bytes of all that belongs to them."""
        return tuned_bytes(self.parameters)

    @property
    def saved(self) -> int:
        """Bytes of a saved state: masters, moments and step counts, the best state."""
        return 3 * FLOAT * self.parameters + FLOAT * len(self.shapes) + self.stored


class _Job:
    """What is known of a tuning beforehand."""

    def __init__(self, source: ModelSource, packed: Path, settings: FinetuneSettings, memory_gib: float) -> None:
        self.source, self.settings, self.memory_gib = source, settings, memory_gib
        self.device = default_device()
        self.notes: list[str] = []
        self.packed = PackedDirectory(packed)
        self.student = ModelSource.open(str(packed), accepted_method=METHOD)
        self.rows, self.context = self._text()
        self.reading = peak_bytes()
        self.heldout = finetune.heldout_of(self.rows, settings)
        self.kinds: dict[str, TuningSettings] = {}
        if settings.blocks is not None:
            self.kinds[BY_BLOCK] = settings.blocks
        if settings.end_to_end is not None:
            self.kinds[END] = settings.end_to_end

    def _text(self) -> tuple[int, int]:
        """(windows, tokens in each). A hub text is not read."""
        data = self.settings.data or CALIBRATION_DATA
        if not load_documents(data, calibrate.load_tokenizer(self.source)).streamed:
            windows = finetune.load_windows(self.source, self.settings, Silent())
            return windows.rows, windows.context
        asked = self.settings.samples + self.settings.heldout
        self.notes.append(f"{data} is not read: {asked} windows of it are taken to be there")
        return asked, calibrate.context_of(self.source, self.settings.context)

    def text_of(self, kind: str, settings: TuningSettings) -> TuningText:
        """How the text goes through: in pieces of so many windows."""
        most = MICRO_TOKENS // self.context
        if kind == END:
            most = distill.most_rows(self.context, self.vocabulary)
        piece = largest_divisor(settings.batch, most)
        return TuningText(self.rows - self.heldout, self.heldout, self.context, settings.epochs, settings.batch, piece)

    def measure(self) -> None:
        """Run one block of each kind, plain and packed, forward and back, and the head."""
        skeleton = Imagined(self.source, device=self.device)
        self.notes += skeleton.notes
        self.vocabulary = forward_rates.vocabulary_of(skeleton)
        self.sizes = sizes_of(skeleton)
        self.head = tuning_rates.measure_head(skeleton, getattr(self.settings.end_to_end, "autocast", False))
        self.texts = {kind: self.text_of(kind, settings) for kind, settings in self.kinds.items()}
        weights = FLOAT * sum(layout.weights for layout in self.packed.layouts.values())
        self.decoded = weights if weights <= self.memory_gib * 2**30 else 0
        piece = max(text.piece for text in self.texts.values())
        self.forward = forward_rates.measure_forward(skeleton, piece, self.context, FORWARD_SECONDS / 3)
        self.tuning = {kind: self._measured(skeleton, kind, settings) for kind, settings in self.kinds.items()}
        self.masters = {kind: self._masters(kind, settings) for kind, settings in self.kinds.items()}
        self.resident = settled_bytes()

    def _measured(self, skeleton: Imagined, kind: str, settings: TuningSettings) -> Tuning:
        whole = kind == END
        return tuning_rates.measure_tuning(
            skeleton,
            self.packed.layouts,
            settings,
            self.texts[kind].piece,
            self.context,
            decoded=bool(self.decoded) or not whole,
            autocast=getattr(settings, "autocast", False),
            packed=not whole,
            allowed=TUNING_SECONDS / len(self.kinds),
        )

    def _masters(self, kind: str, settings: TuningSettings) -> _Masters:
        """By the stages' own rule, from the vectors as they are stored: equal scales are one parameter."""
        model = Imagined(self.student, prepare=blockwise.packed_modules_of(self.student)).model
        for name, layer in swap.packed_layers(model).items():
            for part in ("scale_in", "scale_out", "lut"):
                if getattr(layer, part) is not None:
                    setattr(layer, part, nn.Parameter(self.packed.read(f"{name}.{part}"), requires_grad=False))
        vectors = self.packed.vectors()
        for name in vectors:
            path, _, leaf = name.rpartition(".")
            model.get_submodule(path)._parameters[leaf] = nn.Parameter(self.packed.read(name), requires_grad=False)
        if kind == BY_BLOCK:
            prefixes = tuple(f"{name}." for name, _ in Imagined(self.source).blocks)
            vectors = {name: dtype for name, dtype in vectors.items() if name.startswith(prefixes)}
        trained = Trained(model, "", vectors, Rates(settings.learning_rate, settings.norm_rate, settings.lut_rate))
        shapes = {name: tuple(master.shape) for name, master in trained.masters.items()}
        stored = sum(tensor.nbytes for tensor in trained.stored().values())
        if getattr(settings, "head_rate", 0) > 0:
            weight = model.get_output_embeddings().weight
            shapes["head"] = tuple(weight.shape)
            stored += weight.numel() * next(self.student.dtype(name).itemsize for name in self._head_names(model))
        return _Masters(shapes, len(trained.names), stored)

    def _head_names(self, model: nn.Module) -> list[str]:
        weight = model.get_output_embeddings().weight
        names = [name for name, each in model.named_parameters(remove_duplicate=False) if each is weight and weight.numel()]
        found = [name for name in names if name in self.student.tensor_names]
        if not found:
            raise distill.no_plain_head(self.packed)
        return found

    def phases(self) -> dict[str, int]:
        """Phase -> bytes, on top of the process itself."""
        loading = blockwise.loaded_bytes(self.student, None, self.device) + blockwise.converted_bytes(
            self.student, torch.float32
        )
        student = memory.Student(loading, self.decoded, self.vocabulary, self.memory_gib)
        found: dict[str, int] = {}
        if self.settings.blocks is not None:
            name = BY_BLOCK
            block = self.masters[name].in_memory // self.sizes.blocks
            text, tuning = self.texts[name], self.tuning[name]
            found |= memory.block_tuning_phases(self.sizes, text, tuning, self.forward.peak, block, self.memory_gib)
            found[f"{BY_BLOCK}, verdict"] = memory.verdict(self.sizes, text, student, self.head)
        if self.settings.end_to_end is not None:
            name = END
            text, tuning, trained = self.texts[name], self.tuning[name], self.masters[name].in_memory
            saves = self.settings.end_to_end.gradient_checkpointing
            found |= memory.end_tuning_phases(
                self.sizes, text, tuning, self.forward.peak, trained, student, self.head, recomputed=saves
            )
        return found

    def on_devices(self) -> dict[str, dict[str, int]]:
        """{"ram", "vram"}: on a GPU hidden states wait in RAM."""
        phases = self.phases()
        if self.device.type == "cpu":
            return plan.on_cpu(phases, self.resident, self.reading)
        self.notes.append(plan.ON_GPU)
        waiting = memory.held(2 * self.rows * self.context * self.sizes.token, 0, self.memory_gib)
        ram = {phase: self.resident + min(size, waiting + self.sizes.read) for phase, size in phases.items()}
        return {"ram": {TEXT: self.reading} | ram, "vram": {phase: max(0, size - waiting) for phase, size in phases.items()}}

    def stored(self) -> Stored:
        """What the tuned directory takes: as much as the packed one."""
        files = sorted(self.packed.path.glob("*.safetensors"))
        index = self.packed.path / pack.INDEX_FILE
        copied = sum(file.stat().st_size for file in pack.other_files(self.packed.path))
        return Stored(
            sum(file.stat().st_size for file in files),
            len(files),
            index.stat().st_size if index.is_file() else 0,
            copied,
            self.packed.config.bits_per_weight,
        )

    def disk(self) -> dict[str, int]:
        """What -> bytes. A saved state goes when the next one is complete."""
        stored = self.stored()
        found = {"tuned directory": stored.weights + stored.index + stored.copied}
        tokens = self.rows * self.context
        for kind, masters in self.masters.items():
            result = masters.stored
            if kind == END and self.texts[kind].steps > self.kinds[kind].checkpoint_every:
                result += (2 if self.texts[kind].steps > 2 * self.kinds[kind].checkpoint_every else 1) * masters.saved
            found[f"{kind}, saved states"] = result
            streams = (2 if kind == BY_BLOCK else 1) * tokens * self.sizes.token
            if memory.held(streams, 0, self.memory_gib) == 0:
                found[f"{kind}, activations, while it runs"] = streams
        return found

    def seconds(self) -> dict[str, float]:
        """Step -> seconds."""
        found: dict[str, float] = {}
        forward = self.forward.block / (max(text.piece for text in self.texts.values()) * self.context)
        loading = blockwise.loaded_bytes(self.student, None, self.device) / LOAD_BYTES_PER_S
        for kind, settings in self.kinds.items():
            text, tuning = self.texts[kind], self.tuning[kind]
            heldout, train = text.heldout * self.context, text.rows * self.context
            if kind == BY_BLOCK:
                found["tune blocks"] = tuning_rates.block_tuning_seconds(text, tuning, forward)
                judging = 2 * heldout * (tuning.packed + self.head.judge)
                found["verdict on the blocks"] = loading + heldout * forward + judging
                continue
            found["load"] = loading + tuning.exchange
            found["teacher"] = (heldout + train) * forward
            judged = 1 + (text.steps // settings.judge_every if settings.judge_every else text.epochs)
            found["tune end to end"] = text.epochs * train * (tuning.step + self.head.step) + judged * heldout * (
                tuning.forward + self.head.judge
            )
            found["saved states"] = text.steps // settings.checkpoint_every * self.masters[kind].saved / WRITE_BYTES_PER_S
        return found | {"write": 2 * self.stored().weights / WRITE_BYTES_PER_S}

    def tables(self) -> dict[str, tuple[dict[str, Any], ...]]:
        """What is trained, and on what."""
        text = {"training windows": self.rows - self.heldout, "held-out windows": self.heldout, "context": self.context}
        kinds = tuple(
            {
                "tuning": kind,
                "parameters": self.masters[kind].parameters,
                "tensors": self.masters[kind].names,
                "epochs": settings.epochs,
                "steps": self.texts[kind].steps * (self.sizes.blocks if kind == BY_BLOCK else 1),
                "windows in a step": settings.batch,
                "at once": self.texts[kind].piece,
            }
            for kind, settings in self.kinds.items()
        )
        widest = max(self.masters.values(), key=lambda masters: masters.parameters)
        return {"text": (text,), "tuning": kinds, "what is trained": _rows(widest.shapes)}


def _rows(shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, Any], ...]:
    """Of the table of what is trained; the most parameters first."""
    counts: dict[tuple[str, tuple[int, ...]], int] = {}
    for name, shape in shapes.items():
        key = (plan.starred(name), shape)
        counts[key] = counts.get(key, 0) + 1
    rows = [
        {
            "trained": name,
            "count": count,
            "shape": " x ".join(map(str, shape)),
            "parameters": count * torch.Size(shape).numel(),
        }
        for (name, shape), count in counts.items()
    ]
    return tuple(sorted(rows, key=lambda row: -row["parameters"]))
