"""Owns `qtip eval`: which models, text and dtype go into an evaluation, in which order they are in memory, and its result."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from qtipcli.data.text import EVALUATION_DATA, EVALUATION_SPLIT, SHORT_NAMES_WINDOWS, Documents, load_documents
from qtipcli.data.windows import Windows, evaluation_windows
from qtipcli.errors import QtipError, SettingsError
from qtipcli.hub.config import METHOD
from qtipcli.stages import blockwise, evaluate, zero_shot
from qtipcli.stages.blockwise import Opened
from qtipcli.stages.calibrate import LONGEST_DEFAULT_CONTEXT
from qtipcli.stages.evaluate import EvaluationResult, Logits
from qtipcli.stages.inspect import read_config
from qtipcli.stages.load import check_name, computing_dtype, load_config
from qtipcli.stages.progress import Silent, Watcher
from qtipcli.stages.reference import DEFAULT_CACHE_GIB, KeptLogits
from qtipcli.stages.reference_store import StoredLogits, original_key
from qtipcli.stages.zero_shot import TaskScore
from qtipcli.untrusted import read_table

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

WIDER = {torch.float32: torch.float64, torch.bfloat16: torch.float32, torch.float16: torch.float32}
"""What the original is computed in where its rounding in the evaluated model's dtype is to be measured."""


@dataclass(frozen=True)
class Evaluation:
    """All that `qtip eval` has to say of one model.

    Attributes:
        model, base: as they were named; base is None without an original.
        results: the figures, one for each context, in the order asked for.
        tasks: zero-shot scores, where tasks were asked for.
    """

    model: str
    base: str | None
    results: tuple[EvaluationResult, ...]
    tasks: tuple[TaskScore, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """{"model", "base", the first context's figures, "rows": every context's, "tasks"}."""
        rows = [result.as_json() for result in self.results]
        tasks = {"tasks": [score.as_json() for score in self.tasks]} if self.tasks else {}
        return {"model": self.model, "base": self.base, **rows[0], "rows": rows, **tasks}


@dataclass(frozen=True)
class Keeping:
    """What is kept of the original's logits, if anything.

    Attributes:
        gib: at most; None for DEFAULT_CACHE_GIB where `directory` is given, and for nothing where it is not.
        directory: where they stay for later runs; None for a temporary file.
    """

    gib: float | None = None
    directory: Path | None = None

    def __post_init__(self) -> None:
        if self.gib is not None and not 0 <= self.gib < inf:
            raise SettingsError(f"a cache of {self.gib:g} GiB cannot be", "0 keeps nothing, 16 is the default")

    @property
    def cap_bytes(self) -> int:
        """Of all files together; 0 keeps nothing."""
        default = 0.0 if self.directory is None else DEFAULT_CACHE_GIB
        return int((default if self.gib is None else self.gib) * 2**30)


def run(
    directory: str,
    base: str | None,
    data: str | None = None,
    context: int | None = None,
    windows: int | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    watcher: Watcher | None = None,
) -> EvaluationResult:
    """`run_all` with one context and nothing else: its figures alone."""
    contexts = () if context is None else (context,)
    return run_all(directory, base, data, contexts, windows, dtype, trust_remote_code, watcher=watcher).results[0]


def run_all(
    directory: str,
    base: str | None = None,
    data: str | None = None,
    contexts: Sequence[int] = (),
    windows: int | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    *,
    noise_floor: bool = False,
    stream: bool | None = None,
    keeping: Keeping | None = None,
    tasks: Sequence[str] = (),
    watcher: Watcher | None = None,
) -> Evaluation:
    """Evaluate a packed or plain model on held-out text, against `base` where given.

    data: None is WikiText-2's test split. contexts: empty is the model's own positions, at most 2,048. windows: None is all.
    noise_floor: compute the original in a wider dtype too, and say what rounding alone costs.
    stream: block by block or not; None decides by the free memory (see blockwise.must_stream).
    keeping: where something is kept, the original is loaded first and let go, or not loaded at all.
    tasks: zero-shot tasks of lm-eval, measured for the original too.

    Raises SettingsError, and QtipError as `evaluate.run`, load_model, evaluation_windows and zero_shot.run do.
    """
    watcher, keeping = watcher or Silent(), keeping or Keeping()
    chosen = chosen_dtype(dtype)
    for name in filter(None, (directory, base)):
        check_name(name)
    refuse_without_original(base is not None, noise_floor, keeping)
    if tasks:
        zero_shot.check(tasks, stream)
    asked = _Asked(directory, base, chosen, trust_remote_code, noise_floor, keeping, watcher)
    asked.stream = blockwise.must_stream(asked.together(), trust_remote_code, stream, watcher)
    results = asked.figures(_all_windows(directory, data, contexts, windows, trust_remote_code, watcher))
    scores = zero_shot.run(directory, base, tasks, chosen, trust_remote_code, watcher) if tasks else ()
    return Evaluation(directory, base, results, tuple(scores))


def refuse_without_original(has_original: bool, noise_floor: bool, keeping: Keeping) -> None:
    """Raise SettingsError where something is asked for that needs the original, and it is not given."""
    if not has_original and (noise_floor or keeping != Keeping()):
        what = "a noise floor needs" if noise_floor else "the original's logits cannot be kept without"
        raise SettingsError(f"{what} the original model", "give --base MODEL")


@dataclass
class _Asked:
    """One evaluation, as it was asked for. stream: whether models are evaluated block by block."""

    directory: str
    base: str | None
    dtype: torch.dtype | None
    trust: bool
    noise_floor: bool
    keeping: Keeping
    watcher: Watcher
    stream: bool = False
    _used: int = 0

    def together(self) -> list[tuple[str, torch.dtype | None]]:
        """(name, dtype) of the models that would be in memory at once."""
        found = [(self.directory, self.dtype)]
        if self.base is not None and not self.keeping.cap_bytes:
            found.append((self.base, self._base_dtype()))
        return [*found, (self.base, self._narrow())] if self.noise_floor else found

    def figures(self, all_rows: Sequence[Windows]) -> tuple[EvaluationResult, ...]:
        """One result for each of `all_rows`."""
        with contextlib.ExitStack() as stack:
            references = self._references(all_rows, stack)
            gc.collect()  # a model with a cycle of references, such as a hook that knows it, would still be there
            own = self._open(self.directory, self.dtype)
            noise = self._open(self.base, self._narrow()) if self.noise_floor else None
            return tuple(self._figures(rows, own, each, noise) for rows, each in zip(all_rows, references, strict=True))

    def _figures(
        self, rows: Windows, own_model: Opened, base_model: Opened | None, noise_model: Opened | None
    ) -> EvaluationResult:
        with contextlib.ExitStack() as stack:
            base, own, noise = (
                None if model is None else stack.enter_context(contextlib.closing(model(rows)))
                for model in (base_model, own_model, noise_model)
            )
            self.watcher.begin(f"eval, context {rows.context}", rows.rows)
            predictions = evaluate.predict(own, rows, base, noise, lambda done, total: self.watcher.advance("windows"))
            protocol = evaluate.protocol_of(rows, own, base, noise)
            return evaluate.summarize(predictions, protocol, stored_bits(Path(self.directory)))

    def _references(self, all_rows: Sequence[Windows], stack: contextlib.ExitStack) -> list[Opened | None]:
        """The original for each of `all_rows`; where its logits are kept, they are so before this returns."""
        if self.base is None:
            return [None] * len(all_rows)
        dtype = self._base_dtype()
        if not self.keeping.cap_bytes:
            model = self._open(self.base, dtype)
            return [model] * len(all_rows)
        # Once, and only where logits are missing.
        opened = functools.cache(lambda: self._open(self.base, dtype))
        kept = [self._kept(rows, opened, dtype, stack) for rows in all_rows]
        return [lambda rows, each=each: each for each in kept]

    def _kept(
        self, rows: Windows, opened: Callable[[], Opened], dtype: torch.dtype | None, stack: contextlib.ExitStack
    ) -> Logits:
        if self.keeping.directory is None:
            kept: Logits = KeptLogits(opened()(rows), rows.rows, self.keeping.cap_bytes - self._used, self.watcher)
            self._used += kept.bytes
        else:
            key = original_key(self.base, dtype, self.trust)
            kept = StoredLogits(self.keeping.directory, key, rows, lambda: opened()(rows), self.keeping.cap_bytes, self.watcher)
        stack.callback(kept.close)
        return kept

    def _open(self, name: str, dtype: torch.dtype | None) -> Opened:
        return blockwise.open_model(name, dtype, self.trust, self.stream, self.watcher)

    def _narrow(self) -> torch.dtype:
        """What the evaluated model computes in."""
        return computing_dtype(load_config(self.directory, self.trust), self.dtype)

    def _base_dtype(self) -> torch.dtype | None:
        return WIDER[self._narrow()] if self.noise_floor else self.dtype


def _all_windows(
    name: str, data: str | None, contexts: Sequence[int], windows: int | None, trust: bool, watcher: Watcher
) -> list[Windows]:
    """The windows of each context, after making sure that the model can read all of them."""
    config, tokenizer = load_config(name, trust), load_tokenizer(name, trust)
    found = []
    for context in dict.fromkeys(contexts) or (None,):
        documents = load_documents(data or EVALUATION_DATA, tokenizer, EVALUATION_SPLIT)
        rows = windows_for(config, tokenizer, documents, context, windows or SHORT_NAMES_WINDOWS.get(data or ""))
        evaluate.check_fits(config, rows)
        note_shortage(rows, watcher)
        found.append(rows)
    return found


def chosen_dtype(name: str | None) -> torch.dtype | None:
    """The dtype of that name, None where none was named. Raises SettingsError."""
    if name is not None and name not in DTYPES:
        raise SettingsError(f"there is no dtype {name!r}", f"choose one of {', '.join(DTYPES)}")
    return DTYPES[name] if name else None


def load_tokenizer(name: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises QtipError where transformers loads none."""
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    # Files that somebody else wrote can make transformers raise anything.
    except Exception as error:
        raise QtipError(f"{name} has no tokenizer that transformers can load", "check the path or the hub name") from error


def windows_for(
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    documents: Documents,
    context: int | None,
    windows: int | None,
) -> Windows:
    """The windows that a model of this config is evaluated on; context None is its positions, at most 2,048."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", LONGEST_DEFAULT_CONTEXT)
    return evaluation_windows(tokenizer, documents, context or min(longest, LONGEST_DEFAULT_CONTEXT), windows)


def note_shortage(rows: Windows, watcher: Watcher) -> None:
    """Tell the user where the text holds fewer windows than were asked for."""
    if rows.requested and rows.rows < rows.requested:
        watcher.note(f"{rows.source} holds {rows.rows} windows of {rows.context} tokens, not {rows.requested}: all are used")


def stored_bits(directory: Path) -> float | None:
    """Stored bits per weight of a packed directory; None for another model."""
    try:
        fields = read_table(directory / "config.json", "").get("quantization_config")
    except QtipError:
        return None
    if not isinstance(fields, dict) or fields.get("quant_method") != METHOD:
        return None
    return read_config(directory).bits_per_weight
