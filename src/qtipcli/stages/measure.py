"""Owns `qtip eval`: which models, text and dtype go into an evaluation, from what the user named."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from qtipcli.data.text import EVALUATION_DATA, EVALUATION_SPLIT, Documents, load_documents
from qtipcli.data.windows import Windows, evaluation_windows
from qtipcli.errors import QtipError, SettingsError
from qtipcli.hub.config import METHOD
from qtipcli.stages import evaluate
from qtipcli.stages.calibrate import LONGEST_DEFAULT_CONTEXT
from qtipcli.stages.inspect import read_config
from qtipcli.stages.load import check_name, load_model
from qtipcli.stages.progress import Silent, Watcher

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def run(
    directory: str,
    base: str | None,
    data: str | None = None,
    context: int | None = None,
    windows: int | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    watcher: Watcher | None = None,
) -> evaluate.EvaluationResult:
    """Evaluate a packed or plain model on held-out text, against `base` where given.

    data: None is WikiText-2's test split. context: None is the model's own positions, at most 2,048. windows: None is all.
    """
    watcher = watcher or Silent()
    chosen = chosen_dtype(dtype)
    for name in filter(None, (directory, base)):
        check_name(name)
    tokenizer = load_tokenizer(directory, trust_remote_code)
    documents = load_documents(data or EVALUATION_DATA, tokenizer, EVALUATION_SPLIT)
    model = load_model(directory, chosen, trust_remote_code)
    rows = windows_for(model.config, tokenizer, documents, context, windows)
    note_shortage(rows, watcher)
    base_model = None if base is None else load_model(base, chosen, trust_remote_code)
    watcher.begin("eval", rows.rows)
    return evaluate.run(
        model,
        base_model,
        rows,
        bits_per_weight=stored_bits(Path(directory)),
        progress=lambda done, total: watcher.advance("windows"),
    )


def chosen_dtype(name: str | None) -> torch.dtype | None:
    """The dtype of that name, None where none was named. Raises SettingsError."""
    if name is not None and name not in DTYPES:
        raise SettingsError(f"there is no dtype {name!r}", f"choose one of {', '.join(DTYPES)}")
    return DTYPES[name] if name else None


def load_tokenizer(name: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises QtipError where transformers loads none."""
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
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
        fields = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if fields.get("quantization_config", {}).get("quant_method") != METHOD:
        return None
    return read_config(directory).bits_per_weight
