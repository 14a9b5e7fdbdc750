"""Owns what `qtip eval --dry-run` does: the text, passes, memory, disk and time of an evaluation."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from qtipcli.data.text import EVALUATION_DATA, EVALUATION_SPLIT, SHORT_NAMES_WINDOWS, load_documents
from qtipcli.errors import SettingsError
from qtipcli.model.imagined import Imagined
from qtipcli.model.source import ModelSource
from qtipcli.stages import blockwise, calibrate, evaluate, forward_rates, measure, memory, zero_shot
from qtipcli.stages.blockwise import WEIGHTS_SHARE
from qtipcli.stages.evaluate import BLOCK_BY_BLOCK, IN_MEMORY
from qtipcli.stages.forward_rates import FORWARD_SECONDS, Forward
from qtipcli.stages.load import computing_dtype, default_device
from qtipcli.stages.measure import WIDER, Keeping, chosen_dtype, windows_for
from qtipcli.stages.own_process import age_seconds, peak_bytes, settled_bytes
from qtipcli.stages.plan import LOAD_BYTES_PER_S, ON_GPU, TEXT, WRITE_BYTES_PER_S, Plan, on_cpu
from qtipcli.stages.reference import DEFAULT_CACHE_GIB, FREE_SHARE
from qtipcli.stages.room import free_bytes

WIKITEXT2_TOKENS = 300_000
"""Of the test split of WikiText-2, about: 289,000 with Llama 3's tokenizer and 341,000 with Llama 2's, 141 and 166 windows of
2,048 tokens in the literature."""

EVALUATED, ORIGINAL, NOISE = "evaluated", "original", "noise floor"


@dataclass(frozen=True, slots=True)
class Text:
    """Windows that a model is evaluated on."""

    windows: int
    context: int

    @property
    def predictions(self) -> int:
        """That count."""
        return self.windows * (self.context - 1)


@dataclass(frozen=True, slots=True)
class _Model:
    """One model of an evaluation. forward: of a window of each text, in the texts' order.

    Bytes: weights, of all in memory; converted, of those on disk whose dtype changes; block, of the largest; outside, of
    everything else, the head included; token, of one token's hidden states.
    """

    source: ModelSource
    role: str
    dtype: torch.dtype
    weights: int
    converted: int
    block: int
    outside: int
    token: int
    vocabulary: int
    forward: tuple[Forward, ...]

    @property
    def loading(self) -> int:
        """Bytes while transformers loads it: files are mapped, and what is converted stays so beside its copy."""
        return self.weights + self.converted

    @property
    def loaded(self) -> int:
        """Bytes behind that. A packed model keeps the maps of its files, whose walks are used as they are."""
        return self.loading if blockwise.packed_modules_of(self.source) else self.weights

    def logits(self, text: Text) -> int:
        """Bytes of one window's."""
        return text.context * self.vocabulary * self.dtype.itemsize

    def hidden(self, text: Text) -> int:
        """Bytes of all windows' hidden states."""
        return text.windows * text.context * self.token


def of_eval(
    sources: Sequence[ModelSource],
    base: ModelSource | None,
    data: str | None = None,
    contexts: Sequence[int] = (),
    windows: int | None = None,
    dtype: str | None = None,
    *,
    noise_floor: bool = False,
    stream: bool | None = None,
    keeping: Keeping | None = None,
    compare: bool = False,
    tasks: Sequence[str] = (),
) -> Plan:
    """The plan of measure.run_all, or with `compare` of compare.run, which keeps the original's logits.

    Raises SettingsError as they do, and where a hub text has no end that is known: then say --windows.
    """
    keeping = keeping or Keeping()
    measure.refuse_without_original(base is not None, noise_floor, keeping)
    if tasks:
        zero_shot.check(tasks, stream)
    if compare and keeping.gib is None:
        keeping = Keeping(DEFAULT_CACHE_GIB)
    job = _Job(sources, base, dtype, noise_floor, keeping, compare)
    job.read_text(base if compare and base is not None else sources[0], data, contexts, windows)
    start, job.reading = age_seconds(), peak_bytes()
    job.choose_placement(stream)
    job.measure()
    if tasks:
        job.notes.append("the zero-shot tasks are not counted: they take more memory, disk and time than is said here")
    first = sources[0].name if len(sources) == 1 else f"{len(sources)} models"
    return Plan(
        command="eval",
        model=first,
        layers=(),
        stored=None,
        **job.on_devices(),
        disk=job.disk(),
        seconds={"start": start} | job.seconds(),
        notes=tuple(job.notes),
        tables=job.tables(),
    )


class _Job:
    """What is known of an evaluation beforehand."""

    def __init__(
        self,
        sources: Sequence[ModelSource],
        base: ModelSource | None,
        dtype: str | None,
        noise_floor: bool,
        keeping: Keeping,
        compare: bool,
    ) -> None:
        self.keeping, self.compare, self.device = keeping, compare, default_device()
        self.reading = 0
        self.notes: list[str] = []
        chosen = chosen_dtype(dtype)
        narrow = computing_dtype(sources[0].config, chosen)
        self.asked = [(source, EVALUATED, computing_dtype(source.config, chosen)) for source in sources]
        if base is not None:
            wide = WIDER[narrow] if noise_floor else computing_dtype(base.config, chosen)
            self.asked.append((base, ORIGINAL, wide))
            if noise_floor:
                self.asked.append((base, NOISE, narrow))

    def read_text(self, source: ModelSource, data: str | None, contexts: Sequence[int], windows: int | None) -> None:
        """Find `texts`: how many windows of how many tokens."""
        tokenizer = calibrate.load_tokenizer(source)
        count = windows or SHORT_NAMES_WINDOWS.get(data or "")
        self.texts = [_text(source, tokenizer, data, context, count) for context in dict.fromkeys(contexts) or (None,)]
        if load_documents(data or EVALUATION_DATA, tokenizer, EVALUATION_SPLIT).streamed:
            self.notes.append(f"{data or EVALUATION_DATA} is not read: its windows are taken to be there")

    def choose_placement(self, asked: bool | None) -> None:
        """Find `stream`: whether blocks come one at a time, as blockwise.must_stream decides it."""
        sizes = {role: [] for _, role, _ in self.asked}
        for source, role, dtype in self.asked:
            sizes[role].append(blockwise.loaded_bytes(source, dtype, self.device))
        if self.compare:
            needed = max(max(each) for each in sizes.values())
        else:
            needed = sum(sum(each) for role, each in sizes.items() if role != ORIGINAL or not self.keeping.cap_bytes)
        free = free_bytes(self.device)
        self.stream = asked if asked is not None else needed > WEIGHTS_SHARE * free
        if asked is None and self.stream:
            self.notes.append(f"whole models do not fit into the {free / 1e9:.3g} GB that are free: block by block")

    def measure(self) -> None:
        """Run one block of each kind of each model, and compare logits."""
        allowed = FORWARD_SECONDS / len({(source.directory, dtype) for source, _, dtype in self.asked}) / len(self.texts)
        found: dict[Any, _Model] = {}
        for source, role, dtype in self.asked:
            key = (source.directory, dtype)
            if key not in found:
                found[key] = self._measured(source, role, dtype, allowed)
            found[key, role] = replace(found[key], role=role)
        self.models = [found[(source.directory, dtype), role] for source, role, dtype in self.asked]
        beside = 2 if self.compare else len(self.models)
        vocabulary = self.models[0].vocabulary
        self.comparisons = [forward_rates.comparison(text.context, vocabulary, beside, self.device) for text in self.texts]
        self.resident = settled_bytes()

    def _measured(self, source: ModelSource, role: str, dtype: torch.dtype, allowed: float) -> _Model:
        skeleton = Imagined(source, dtype, self.device, blockwise.packed_modules_of(source))
        self.notes += [f"{source.name}: {note}" for note in skeleton.notes]
        parameters = dict(skeleton.model.named_parameters())
        weights = blockwise.loaded_bytes(source, dtype, self.device)
        return _Model(
            source,
            role,
            dtype,
            weights,
            converted=blockwise.converted_bytes(source, dtype),
            block=max(sum(each.nbytes for each in block.parameters()) for _, block in skeleton.blocks),
            outside=sum(parameters[name].nbytes for name in skeleton.outer_names if name in parameters),
            token=forward_rates.width_of(skeleton) * dtype.itemsize,
            vocabulary=forward_rates.vocabulary_of(skeleton),
            forward=tuple(forward_rates.measure_forward(skeleton, 1, text.context, allowed) for text in self.texts),
        )

    def kept(self) -> int:
        """Bytes of the original's logits that are kept in files, as far as there is room."""
        if not self.keeping.cap_bytes:
            return 0
        wanted = sum(
            text.predictions * model.vocabulary * model.dtype.itemsize for model in self._of(ORIGINAL) for text in self.texts
        )
        where = (self.keeping.directory or Path(tempfile.gettempdir())).absolute()
        there = next(path for path in (where, *where.parents) if path.exists())
        return min(wanted, self.keeping.cap_bytes, int(shutil.disk_usage(there).free * FREE_SHARE))

    def phases(self) -> dict[str, int]:
        """Phase -> bytes, on top of the process itself."""
        alone = [model for model in self.models if self.keeping.cap_bytes and model.role == ORIGINAL]
        groups = [alone, [model for model in self.models if model not in alone]]
        if self.compare:
            groups = [alone, *([model] for model in self.models if model not in alone)]
        found: dict[str, int] = {}
        for group in filter(None, groups):
            read = [model for model in alone if model not in group]
            for phase, size in self._together(group, read).items():
                found[phase] = max(found.get(phase, 0), size)
        return found

    def _together(self, group: Sequence[_Model], read: Sequence[_Model]) -> dict[str, int]:
        """Of models that are in memory at once. read: those of which one window's logits are read from a file."""
        found: dict[str, int] = {}
        before = 0
        for model in group:
            if self.stream:
                hidden = max(
                    memory.held(text.windows * text.context * model.token, text.context * model.token) for text in self.texts
                )
                passing = max(forward.peak for forward in model.forward)
                found["blocks, one at a time"] = max(
                    found.get("blocks, one at a time", 0), before + hidden + model.block + passing
                )
                before += hidden + model.outside
            else:
                found["loading"] = max(found.get("loading", 0), before + model.loading)
                before += model.loaded
        for index, text in enumerate(self.texts):
            made = 0
            for model in (*read, *group):
                made += model.logits(text)
                passing = 0 if self.stream or model in read else model.forward[index].peak
                found["a window's logits"] = max(found.get("a window's logits", 0), before + made + passing)
            found["comparing"] = max(found.get("comparing", 0), before + self.comparisons[index][1])
        return found

    def on_devices(self) -> dict[str, dict[str, int]]:
        """{"ram", "vram"}: transformers loads into RAM, also for a GPU."""
        phases = self.phases()
        if self.device.type == "cpu":
            return on_cpu(phases, self.resident, self.reading)
        self.notes.append(ON_GPU)
        largest = max(model.block if self.stream else model.loading for model in self.models)
        return {"ram": {TEXT: self.reading, "loading": self.resident + largest}, "vram": phases}

    def disk(self) -> dict[str, int]:
        """What -> bytes."""
        hidden = {
            "activations, while it runs": sum(
                model.hidden(text) for model in self.models for text in self.texts if memory.held(model.hidden(text), 0) == 0
            )
            if self.stream
            else 0,
            "original's logits" + ("" if self.keeping.directory else ", while it runs"): self.kept(),
        }
        return {what: size for what, size in hidden.items() if size}

    def seconds(self) -> dict[str, float]:
        """Step -> seconds."""
        loading = sum(model.loading for model in self.models) / LOAD_BYTES_PER_S
        passes = dict.fromkeys((model.role for model in self.models), 0.0)
        for model in self.models:
            passes[model.role] += sum(
                text.windows * forward.seconds for text, forward in zip(self.texts, model.forward, strict=True)
            )
        times = len(self._of(EVALUATED)) if self.compare else 1
        compared = times * sum(text.windows * each[0] for text, each in zip(self.texts, self.comparisons, strict=True))
        kept = (1 + times) * self.kept() / WRITE_BYTES_PER_S
        return {"load": loading, **passes, "compare": compared} | ({"keep logits": kept} if kept else {})

    def tables(self) -> dict[str, tuple[dict[str, Any], ...]]:
        """What is read, and what goes through which model."""
        texts = tuple(
            {
                "context": text.context,
                "windows": text.windows,
                "tokens": text.windows * text.context,
                "predictions": text.predictions,
            }
            for text in self.texts
        )
        models = tuple(
            {
                "model": model.source.name,
                "is": model.role,
                "computes in": str(model.dtype).removeprefix("torch."),
                "weights_MB": model.weights / 1e6,
                "how": BLOCK_BY_BLOCK if self.stream else IN_MEMORY,
                "windows": sum(text.windows for text in self.texts),
            }
            for model in self.models
        )
        return {"text": texts, "models": models}

    def _of(self, role: str) -> list[_Model]:
        return [model for model in self.models if model.role == role]


def _text(
    source: ModelSource, tokenizer: PreTrainedTokenizerBase, data: str | None, context: int | None, count: int | None
) -> Text:
    """The windows of one context. A hub text is not read."""
    documents = load_documents(data or EVALUATION_DATA, tokenizer, EVALUATION_SPLIT)
    if not documents.streamed:
        rows = windows_for(source.config, tokenizer, documents, context, count)
        evaluate.check_fits(source.config, rows)
        return Text(rows.rows, rows.context)
    context = calibrate.context_of(source, context)
    if count is None and (data or EVALUATION_DATA) != EVALUATION_DATA:
        raise SettingsError(f"how long {data} is is not known before it is read", "say --windows N")
    return Text(count or max(1, WIKITEXT2_TOKENS // context), context)
