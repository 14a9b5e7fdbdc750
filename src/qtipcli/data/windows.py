"""Owns the windows: how documents become the rows of tokens that a model is calibrated and evaluated on.

Only this file knows where special tokens go, how documents are joined, which windows a seed chooses, and what identifies them.

Calibration: each document gets the special tokens of its own tokenizer (for most a BOS in front), an EOS stands between
documents where the tokenizer has one, and the seed chooses among all non-overlapping windows.
Evaluation: documents are joined by blank lines and tokenized as one text, special tokens once; the first windows count. That is
the protocol of the published WikiText-2 figures, but for the BOS, which their scripts put there or not as the tokenizer does.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from qtipcli.data.text import Documents
from qtipcli.errors import QtipError, SettingsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# An endless stream is read until it has this many times the windows asked for, so that the seed has a choice.
STREAM_CHOICE = 4
# For evaluation a stream is read to this many characters a token, then tokenized; twice as far where that was too few.
_CHARACTERS_PER_TOKEN = 8  # web text has 4 to 5 with most vocabularies
_BLANK_LINE = "\n\n"


@dataclass(frozen=True)
class Windows:
    """Rows of tokens, and what a report or a fingerprint must say of them.

    Attributes:
        tokens: int64 [rows, context].
        source: the documents' name.
        available: the non-overlapping windows that the text read holds; the rows are chosen among them.
        requested: the rows asked for, or None for all; where fewer are available, all of them are here.
        special_tokens: where special tokens stand, in words.
        content_hash: sha256, hex, of the text that was read and of `tokens` in their order.
    """

    tokens: torch.Tensor
    source: str
    available: int
    requested: int | None
    special_tokens: str
    content_hash: str

    @property
    def rows(self) -> int:
        return self.tokens.shape[0]

    @property
    def context(self) -> int:
        return self.tokens.shape[1]


def calibration_windows(
    tokenizer: PreTrainedTokenizerBase, documents: Documents, samples: int, context: int, seed: int
) -> Windows:
    """`samples` windows of `context` tokens, chosen by `seed` without replacement, in the seed's order.

    Local documents are read whole, so the choice is among everything; a hub stream is read only to STREAM_CHOICE * samples
    windows. With fewer windows than `samples` all are taken: compare `rows` to `requested`, and tell the user.

    Raises QtipError where the text is shorter than one window, and what reading the documents raises.
    """
    if samples < 1 or context < 1:
        raise SettingsError(f"{samples} windows of {context} tokens cannot be taken", "ask for 1 or more of each")
    text_hash = hashlib.sha256()
    tokens_N = _calibration_tokens(
        tokenizer, documents, STREAM_CHOICE * samples * context if documents.streamed else None, text_hash
    )
    windows_WT = _cut(tokens_N, context, documents.source)
    chosen = windows_WT[_seeded_order(len(windows_WT), seed)[:samples]]
    special_tokens = f"{_own_special_tokens(tokenizer)} once a document, {tokenizer.eos_token or 'none'} between documents"
    return _windows(chosen, len(windows_WT), documents.source, samples, special_tokens, text_hash)


def evaluation_windows(
    tokenizer: PreTrainedTokenizerBase, documents: Documents, context: int, windows: int | None = None
) -> Windows:
    """The first `windows` non-overlapping windows of `context` tokens, or all of them.

    Where the text is short, fewer come back: compare `rows` to `requested`, and tell the user.

    Raises QtipError where the text is shorter than one window, and what reading the documents raises.
    """
    if context < 2 or (windows is not None and windows < 1):
        raise SettingsError(
            f"{'all' if windows is None else windows} windows of {context} tokens cannot be evaluated",
            "ask for at least 1 window of at least 2 tokens: the first token of a window is not predicted",
        )
    text_hash = hashlib.sha256()
    tokens_N = _evaluation_tokens(tokenizer, documents, None if windows is None else windows * context, text_hash)
    windows_WT = _cut(tokens_N, context, documents.source)
    special_tokens = f"{_own_special_tokens(tokenizer)} once, at the text's start"
    return _windows(windows_WT[:windows], len(windows_WT), documents.source, windows, special_tokens, text_hash)


def _calibration_tokens(
    tokenizer: PreTrainedTokenizerBase, documents: Documents, enough: int | None, text_hash: hashlib._Hash
) -> np.ndarray:
    """All documents' tokens in a row, int64 [N]; no document after the first `enough` tokens is read."""
    eos = tokenizer.eos_token_id
    pieces: list[np.ndarray] = []
    length = 0
    for text in documents:
        _add_text(text_hash, text)
        piece = _tokenized(tokenizer, text) if text.strip() else np.empty(0, np.int64)
        if not len(piece):
            continue
        # Some tokenizers end each text with the EOS, or begin it with the same token: one is enough.
        if pieces and eos is not None and eos not in (pieces[-1][-1], piece[0]):
            pieces.append(np.array([eos], np.int64))
        pieces.append(piece)
        length += len(piece)
        if enough is not None and length >= enough:
            break
    return np.concatenate(pieces) if pieces else np.empty(0, np.int64)


def _evaluation_tokens(
    tokenizer: PreTrainedTokenizerBase, documents: Documents, needed: int | None, text_hash: hashlib._Hash
) -> np.ndarray:
    """The tokens of all documents as one text, int64 [N]; a stream is read until it gives `needed`."""
    parts: list[str] = []
    characters = 0
    goal = _CHARACTERS_PER_TOKEN * needed if documents.streamed and needed is not None else None
    for part in documents:
        parts.append(part)
        characters += len(part)
        if goal is not None and characters >= goal:
            if len(_tokenized(tokenizer, _BLANK_LINE.join(parts))) >= needed:
                break
            goal = 2 * characters
    text = _BLANK_LINE.join(parts)
    _add_text(text_hash, text)
    return _tokenized(tokenizer, text)


def _tokenized(tokenizer: PreTrainedTokenizerBase, text: str) -> np.ndarray:
    """int64 [N], special tokens as the tokenizer adds them; not a second BOS where a chat template has written one."""
    has_bos = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    # verbose=False: a text longer than the model's context is meant here, and would be warned of.
    encoding = tokenizer(text, add_special_tokens=not has_bos, return_attention_mask=False, verbose=False)
    return np.array(encoding["input_ids"], np.int64)


def _own_special_tokens(tokenizer: PreTrainedTokenizerBase) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(_tokenized(tokenizer, "").tolist())) or "none"


def _cut(tokens_N: np.ndarray, context: int, source: str) -> np.ndarray:
    """All non-overlapping windows [W, context]; the tokens after the last whole one are left out."""
    count = len(tokens_N) // context
    if count == 0:
        raise QtipError(
            f"data {source} has {len(tokens_N)} tokens, and one window needs {context}",
            "give longer text, or a smaller --context",
        )
    return tokens_N[: count * context].reshape(count, context)


def _seeded_order(count: int, seed: int) -> np.ndarray:
    """A random order of `count` things: that of `count` random 64-bit numbers.

    Drawn from the bare PCG64 generator, whose output NumPy keeps for ever; Generator.permutation may change (NEP 19).
    """
    return np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable")


def _windows(
    tokens_BT: np.ndarray, available: int, source: str, requested: int | None, special_tokens: str, text_hash: hashlib._Hash
) -> Windows:
    content_hash = text_hash.copy()
    content_hash.update(np.ascontiguousarray(tokens_BT, dtype="<i8").tobytes())
    return Windows(
        tokens=torch.from_numpy(np.ascontiguousarray(tokens_BT)),
        source=source,
        available=available,
        requested=requested,
        special_tokens=special_tokens,
        content_hash=content_hash.hexdigest(),
    )


def _add_text(text_hash: hashlib._Hash, text: str) -> None:
    """The length goes in too, so that no two lists of documents read the same."""
    content = text.encode()
    text_hash.update(len(content).to_bytes(8, "little"))
    text_hash.update(content)
