"""Owns `qtip eval`: which models, text and dtype go into an evaluation, from what the user named."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoTokenizer

from qtipcli.data.text import EVALUATION_DATA, EVALUATION_SPLIT, load_documents
from qtipcli.data.windows import evaluation_windows
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
    if dtype is not None and dtype not in DTYPES:
        raise SettingsError(f"there is no dtype {dtype!r}", f"choose one of {', '.join(DTYPES)}")
    chosen = DTYPES[dtype] if dtype else None
    for name in filter(None, (directory, base)):
        check_name(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise QtipError(f"{directory} has no tokenizer that transformers can load", "check the path or the hub name") from error
    documents = load_documents(data or EVALUATION_DATA, tokenizer, EVALUATION_SPLIT)
    model = load_model(directory, chosen, trust_remote_code)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", LONGEST_DEFAULT_CONTEXT)
    rows = evaluation_windows(tokenizer, documents, context or min(longest, LONGEST_DEFAULT_CONTEXT), windows)
    if rows.requested and rows.rows < rows.requested:
        watcher.note(f"{rows.source} holds {rows.rows} windows of {rows.context} tokens, not {rows.requested}: all are used")
    base_model = None if base is None else load_model(base, chosen, trust_remote_code)
    watcher.begin("eval", rows.rows)
    return evaluate.run(
        model,
        base_model,
        rows,
        bits_per_weight=stored_bits(Path(directory)),
        progress=lambda done, total: watcher.advance("windows"),
    )


def stored_bits(directory: Path) -> float | None:
    """Stored bits per weight of a packed directory; None for another model."""
    try:
        fields = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if fields.get("quantization_config", {}).get("quant_method") != METHOD:
        return None
    return read_config(directory).bits_per_weight
