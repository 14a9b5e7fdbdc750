"""Owns the measurement of a model: perplexity on windows of text and, beside the original, KL divergence and top-1 agreement.

Only this file knows which positions count, in what precision they are compared, and how the figures are summed up.
Every window goes through both models and is compared at once; of its logits a few numbers a token are kept.

Position t of a window predicts its token t + 1, so positions 0 ... context - 2 count, for every figure alike.
perplexity = exp(mean of -log q(token)); KL(p || q) = sum over the vocabulary of p (log p - log q), in nats, with p the
original's distribution and q the evaluated model's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qtipcli.data.windows import Windows
from qtipcli.errors import QtipError, SettingsError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Logits converted to float64 at a time: 16 MB an array, whatever the vocabulary and the context.
_CHUNK_LOGITS = 2**21


@dataclass(frozen=True)
class Protocol:
    """What the figures mean: without it a perplexity compares to nothing.

    Attributes:
        data: name of the text, with its split; content_hash: of the text and its windows.
            windows, context: rows, and tokens a row; non-overlapping, from the start of the text.
        special_tokens: where a BOS stands.
        positions: which predictions count, in every figure.
        dtype, base_dtype: that the evaluated model and the original compute in; base_dtype is None without an original.
        arithmetic: of the comparison of the logits.
    """

    data: str
    content_hash: str
    windows: int
    context: int
    special_tokens: str
    dtype: str
    base_dtype: str | None
    positions: str = "0 to context - 2 of each window, for perplexity, KL and top-1"
    arithmetic: str = "softmax, KL and means in float64; KL(original || evaluated) in nats"

    def __str__(self) -> str:
        return (
            f"{self.data}; {self.windows} non-overlapping windows of {self.context} tokens from the start; "
            f"special tokens: {self.special_tokens}; weights in {self.dtype}"
        )


@dataclass(frozen=True)
class EvaluationResult:
    """The figures of one model. Those that need the original are None without it.

    Attributes:
        perplexity, base_perplexity, perplexity_ratio: of the model, of the original, the first over the second.
        kl_mean, kl_median, kl_p99, kl_max: over tokens, in nats, of KL(original || model).
        top1_agreement: share of positions where both models put the same token first.
        tokens: predictions that count.
        bits_per_weight: as stored; the caller's knowledge.
        perplexity_stderr, perplexity_ratio_stderr, kl_stderr: standard errors over windows (neighbouring tokens are not
            independent, windows nearly are); None with one window.
        kl_noise_floor: mean KL(original || original in the evaluated model's dtype), where that was asked for.
    """

    perplexity: float
    tokens: int
    protocol: Protocol
    base_perplexity: float | None = None
    perplexity_ratio: float | None = None
    kl_mean: float | None = None
    kl_median: float | None = None
    kl_p99: float | None = None
    kl_max: float | None = None
    top1_agreement: float | None = None
    bits_per_weight: float | None = None
    perplexity_stderr: float | None = None
    perplexity_ratio_stderr: float | None = None
    kl_stderr: float | None = None
    kl_noise_floor: float | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain values, `protocol` as an object."""
        return asdict(self)


@dataclass(frozen=True)
class _Values:
    """What is kept of every prediction, each float64 [P] for a window, [W, P] for all.

    surprisal is -log q(the token that follows), in nats; agrees is 1 or 0.
    """

    surprisal: np.ndarray
    base_surprisal: np.ndarray | None = None
    kl: np.ndarray | None = None
    agrees: np.ndarray | None = None
    noise: np.ndarray | None = None


def run(
    model: PreTrainedModel,
    base_model: PreTrainedModel | None,
    windows: Windows,
    *,
    noise_model: PreTrainedModel | None = None,
    bits_per_weight: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> EvaluationResult:
    """Measures `model` on `windows`, against `base_model` where there is one.

    Args:
        model: a causal language model; it is put into eval mode and stays where it is.
        base_model: the original, on any device; None for the perplexity alone.
        windows: as evaluation_windows makes them.
        noise_model: the original loaded in the evaluated model's dtype, for the noise floor; base_model in a wider one.
        bits_per_weight: passed through to the result.
        progress: called with (windows done, windows in all) after each.

    Raises:
        SettingsError: the windows are longer than a model's positions, or noise_model comes without base_model.
        QtipError: a token outside of a model's vocabulary, vocabularies of different size, a figure that is not finite.
    """
    if noise_model is not None and base_model is None:
        raise SettingsError("a noise floor needs the original model", "give --base MODEL")
    for candidate in (model, base_model, noise_model):
        if candidate is not None:
            _check_fits(candidate, windows)
            candidate.eval()
    measured: list[_Values] = []
    # Not inference_mode, whose tensors have no version by which layers that share an input could tell that x is unchanged.
    with torch.no_grad():
        for number, row_T in enumerate(windows.tokens, start=1):
            logits_PV = _logits(model, row_T)
            base_PV = None if base_model is None else _logits(base_model, row_T).to(logits_PV.device)
            noise_PV = None if noise_model is None else _logits(noise_model, row_T).to(logits_PV.device)
            values = _values(row_T[1:].to(logits_PV.device), logits_PV, base_PV, noise_PV)
            _check_finite(values, f"window {number} of {windows.rows}")
            measured.append(values)
            if progress is not None:
                progress(number, windows.rows)
    protocol = Protocol(
        data=windows.source,
        content_hash=windows.content_hash,
        windows=windows.rows,
        context=windows.context,
        special_tokens=windows.special_tokens,
        dtype=_dtype_name(model),
        base_dtype=None if base_model is None else _dtype_name(base_model),
    )
    return _summary(measured, protocol, bits_per_weight)


def _check_fits(model: PreTrainedModel, windows: Windows) -> None:
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and windows.context > positions:
        raise SettingsError(
            f"windows of {windows.context} tokens are longer than the {positions} positions of the model",
            f"say --context {positions} or less",
        )
    largest = int(windows.tokens.max())
    if largest >= config.vocab_size:
        raise QtipError(
            f"the text has token {largest}, and the model's vocabulary ends at {config.vocab_size - 1}",
            "tokenize with the model's own tokenizer",
        )


def _logits(model: PreTrainedModel, row_T: torch.Tensor) -> torch.Tensor:
    """Those of the predictions that count, [T - 1, V], in the model's dtype."""
    return model(input_ids=row_T[None].to(model.device), use_cache=False).logits[0, :-1]


def _values(
    following_P: torch.Tensor, logits_PV: torch.Tensor, base_PV: torch.Tensor | None, noise_PV: torch.Tensor | None
) -> _Values:
    """One window's. The logits become float64 a few positions at a time."""
    for other_PV in (base_PV, noise_PV):
        if other_PV is not None and other_PV.shape != logits_PV.shape:
            raise QtipError(
                f"the original predicts {other_PV.shape[-1]} tokens and the evaluated model {logits_PV.shape[-1]}",
                "give as --base the model that was quantized",
            )
    columns: dict[str, list[torch.Tensor]] = {}
    step = max(1, _CHUNK_LOGITS // logits_PV.shape[-1])
    for start in range(0, len(logits_PV), step):
        chunk = slice(start, start + step)
        following = following_P[chunk, None]
        log_q = torch.log_softmax(logits_PV[chunk].double(), -1)
        new = {"surprisal": -log_q.gather(-1, following)[:, 0]}
        if base_PV is not None:
            log_p = torch.log_softmax(base_PV[chunk].double(), -1)
            new["base_surprisal"] = -log_p.gather(-1, following)[:, 0]
            new["kl"] = divergence(log_p, log_q)
            new["agrees"] = (base_PV[chunk].argmax(-1) == logits_PV[chunk].argmax(-1)).double()
            if noise_PV is not None:
                new["noise"] = divergence(log_p, torch.log_softmax(noise_PV[chunk].double(), -1))
        for name, values in new.items():
            columns.setdefault(name, []).append(values)
    return _Values(**{name: torch.cat(parts).cpu().numpy() for name, parts in columns.items()})


def divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) in nats along the last dimension."""
    p = log_p.exp()
    # A term's limit is 0 where p is 0: a model that masks tokens with -inf would give 0 times infinity.
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)


def _check_finite(values: _Values, where: str) -> None:
    for name, subject in (
        ("base_surprisal", "the original's logits are"),
        ("surprisal", "the model's logits are"),
        ("kl", "the KL divergence is"),
        ("noise", "the noise floor's logits are"),
    ):
        column = getattr(values, name)
        if column is not None and not np.isfinite(column).all():
            raise QtipError(
                f"{subject} not finite in {where}", "look for NaN or infinite weights, or evaluate in a wider dtype"
            )


def _summary(measured: list[_Values], protocol: Protocol, bits_per_weight: float | None) -> EvaluationResult:
    stacked = {
        column.name: np.stack([getattr(values, column.name) for values in measured])
        for column in fields(_Values)
        if getattr(measured[0], column.name) is not None
    }
    all_WP = _Values(**stacked)
    perplexity, perplexity_stderr = _exp_mean(all_WP.surprisal)
    figures: dict[str, float | None] = {}
    if all_WP.base_surprisal is not None:
        figures["base_perplexity"], _ = _exp_mean(all_WP.base_surprisal)
        ratio, ratio_stderr = _exp_mean(all_WP.surprisal - all_WP.base_surprisal)
        median, p99 = np.quantile(all_WP.kl, (0.5, 0.99))
        figures |= {
            "perplexity_ratio": ratio,
            "perplexity_ratio_stderr": ratio_stderr,
            "kl_mean": float(all_WP.kl.mean()),
            "kl_median": float(median),
            "kl_p99": float(p99),
            "kl_max": float(all_WP.kl.max()),
            "kl_stderr": _standard_error(all_WP.kl),
            "top1_agreement": float(all_WP.agrees.mean()),
        }
    if all_WP.noise is not None:
        figures["kl_noise_floor"] = float(all_WP.noise.mean())
    return EvaluationResult(
        perplexity=perplexity,
        perplexity_stderr=perplexity_stderr,
        tokens=all_WP.surprisal.size,
        protocol=protocol,
        bits_per_weight=bits_per_weight,
        **figures,
    )


def _exp_mean(surprisal_WP: np.ndarray) -> tuple[float, float | None]:
    """exp of the mean and its standard error: it moves by its own value times what the mean moves by."""
    try:
        value = math.exp(surprisal_WP.mean())
    except OverflowError as error:
        raise QtipError(
            f"the perplexity, exp({surprisal_WP.mean():.0f}), is too large for a number: the model predicts nothing",
            "look for damaged weights",
        ) from error
    error_of_mean = _standard_error(surprisal_WP)
    return value, None if error_of_mean is None else value * error_of_mean


def _standard_error(values_WP: np.ndarray) -> float | None:
    """Of the mean, with the windows' means as the independent observations."""
    means_W = values_WP.mean(axis=1)
    return None if len(means_W) < 2 else float(means_W.std(ddof=1) / math.sqrt(len(means_W)))


def _dtype_name(model: PreTrainedModel) -> str:
    return str(model.dtype).removeprefix("torch.")
