"""Owns the measurement of a model: perplexity on windows of text and, beside the original, KL divergence and top-1 agreement.

Only this file knows which positions count, in what precision they are compared, and how the figures are summed up.
Every window goes through both models and is compared at once; of its logits a few numbers a token are kept.

Position t of a window predicts its token t + 1, so positions 0 ... context - 2 count, for every figure alike.
perplexity = exp(mean of -log q(token)); KL(p || q) = sum over the vocabulary of p (log p - log q), in nats, with p the
original's distribution and q the evaluated model's.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qtipcli.data.windows import Windows
from qtipcli.errors import QtipError, SettingsError
from qtipcli.job.fingerprint import package_version
from qtipcli.stages.histogram import Histogram, histogram_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

CHUNK_LOGITS = 2**17
"""Logits converted to float64 at a time: 1 MB an array, which stays in a core's cache and leaves no holes in the heap."""

IN_MEMORY, BLOCK_BY_BLOCK = "whole model in memory", "block by block"
"""How the evaluated model was run."""

_SOFTWARE = ("qtipcli", "torch", "transformers")


@dataclass(frozen=True)
class Protocol:
    """What the figures mean: without it a perplexity compares to nothing.

    Attributes:
        data: name of the text, with its split; content_hash: of the text and its windows.
            windows, context: rows, and tokens a row; non-overlapping, from the start of the text.
        special_tokens: where a BOS stands.
        positions: which predictions count, in every figure.
        dtype, base_dtype: that the evaluated model and the original compute in; base_dtype is None without an original.
        noise_dtype: of the original that the noise floor compares to the original in base_dtype; None without a noise floor.
        device, placement: what the evaluated model ran on, and whether it was whole in memory.
        software: versions of what can change a figure.
        arithmetic: of the comparison of the logits.
    """

    data: str
    content_hash: str
    windows: int
    context: int
    special_tokens: str
    dtype: str
    base_dtype: str | None
    noise_dtype: str | None = None
    device: str = "cpu"
    placement: str = IN_MEMORY
    software: str = field(default_factory=lambda: ", ".join(f"{name} {package_version(name)}" for name in _SOFTWARE))
    positions: str = "0 to context - 2 of each window, for perplexity, KL and top-1"
    arithmetic: str = "softmax, KL and means in float64; KL(original || evaluated) in nats"

    def __str__(self) -> str:
        return (
            f"{self.data}; {self.windows} non-overlapping windows of {self.context} tokens from the start; "
            f"special tokens: {self.special_tokens}; weights in {self.dtype}, {self.placement}, on {self.device}"
        )


@dataclass(frozen=True)
class EvaluationResult:
    """The figures of one model. Those that need the original are None without it.

    Attributes:
        perplexity, base_perplexity, perplexity_ratio: of the model, of the original, the first over the second.
        kl_mean, kl_median, kl_p99, kl_p999, kl_max: over tokens, in nats, of KL(original || model); p99 is the 99 % quantile,
            p999 the 99.9 % one. kl_histogram: the same values counted.
        top1_agreement: share of positions where both models put the same token first.
        tokens: predictions that count.
        bits_per_weight: as stored; the caller's knowledge.
        perplexity_stderr, perplexity_ratio_stderr, kl_stderr, top1_stderr: standard errors over windows (neighbouring tokens
            are not independent, windows nearly are); None with one window.
        kl_noise_floor: mean KL(original || original in the evaluated model's dtype), where that was asked for: what a model
            without any quantization would score.
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
    kl_p999: float | None = None
    top1_stderr: float | None = None
    kl_histogram: Histogram | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain values, `protocol` and `kl_histogram` as objects."""
        return asdict(self) | {"kl_histogram": None if self.kl_histogram is None else self.kl_histogram.as_json()}


@dataclass(frozen=True)
class Predictions:
    """What is kept of every prediction, each float64 [P] for a window, [W, P] for all.

    surprisal is -log q(the token that follows), in nats; agrees is 1 or 0. What needs the original is None without it.
    """

    surprisal: np.ndarray
    base_surprisal: np.ndarray | None = None
    kl: np.ndarray | None = None
    agrees: np.ndarray | None = None
    noise: np.ndarray | None = None


class Logits(ABC):
    """A model's logits, window by window.

    Attributes: dtype: its name, of the weights that made them; device, placement: as in Protocol.
    """

    dtype: str
    device: str = "cpu"
    placement: str = IN_MEMORY

    @abstractmethod
    def logits(self, index: int) -> torch.Tensor:
        """Of the predictions that count in window `index`, [context - 1, vocabulary], in any dtype, on any device."""

    def close(self) -> None:  # noqa: B027, most have nothing to give back
        """Give memory and files back; no logits are asked for afterwards."""


class ModelLogits(Logits):
    """Logits computed whenever they are asked for.

    Args:
        model: a causal language model; it is put into eval mode and stays where it is.
        windows: as evaluation_windows makes them.

    Raises:
        SettingsError: the windows are longer than the model's positions.
        QtipError: a token outside of its vocabulary.
    """

    def __init__(self, model: PreTrainedModel, windows: Windows) -> None:
        check_fits(model.config, windows)
        model.eval()
        self._model, self._tokens = model, windows.tokens
        self.dtype, self.device = str(model.dtype).removeprefix("torch."), device_name(model.device)

    # Not inference_mode, whose tensors have no version by which layers that share an input could tell that x is unchanged.
    @torch.no_grad()
    def logits(self, index: int) -> torch.Tensor:
        """See Logits."""
        row_T = self._tokens[index].to(self._model.device)
        return self._model(input_ids=row_T[None], use_cache=False).logits[0, :-1]


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
    own, base, noise = (None if each is None else ModelLogits(each, windows) for each in (model, base_model, noise_model))
    predictions = predict(own, windows, base, noise, progress)
    return summarize(predictions, protocol_of(windows, own, base, noise), bits_per_weight)


def predict(
    own: Logits,
    windows: Windows,
    base: Logits | None = None,
    noise: Logits | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Predictions:
    """Every prediction of one model, beside the original's where `base` is given; see `run`, which raises the same errors."""
    measured: list[Predictions] = []
    for index, row_T in enumerate(windows.tokens):
        logits_PV = own.logits(index)
        base_PV, noise_PV = (None if other is None else other.logits(index).to(logits_PV.device) for other in (base, noise))
        values = _compare(row_T[1:].to(logits_PV.device), logits_PV, base_PV, noise_PV)
        del logits_PV, base_PV, noise_PV  # before the next window's are made
        _check_finite(values, f"window {index + 1} of {windows.rows}")
        measured.append(values)
        if progress is not None:
            progress(index + 1, windows.rows)
    columns = {
        column.name: np.stack([getattr(values, column.name) for values in measured])
        for column in fields(Predictions)
        if getattr(measured[0], column.name) is not None
    }
    return Predictions(**columns)


def protocol_of(windows: Windows, own: Logits, base: Logits | None, noise: Logits | None = None) -> Protocol:
    """What the figures of `own` on `windows`, beside `base`, with the noise floor of `noise`, mean."""
    return Protocol(
        data=windows.source,
        content_hash=windows.content_hash,
        windows=windows.rows,
        context=windows.context,
        special_tokens=windows.special_tokens,
        dtype=own.dtype,
        base_dtype=None if base is None else base.dtype,
        noise_dtype=None if noise is None else noise.dtype,
        device=own.device,
        placement=own.placement,
    )


def device_name(device: torch.device) -> str:
    """As a report names it: a GPU by its model."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def check_fits(config: PreTrainedConfig, windows: Windows) -> None:
    """Raise unless a model of this config can read `windows`: SettingsError for their length, QtipError for a token."""
    config = config.get_text_config()
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


def _compare(
    following_P: torch.Tensor, logits_PV: torch.Tensor, base_PV: torch.Tensor | None, noise_PV: torch.Tensor | None
) -> Predictions:
    """One window's. The logits become float64 a few positions at a time."""
    for other_PV in (base_PV, noise_PV):
        if other_PV is not None and other_PV.shape != logits_PV.shape:
            raise QtipError(
                f"the original predicts {other_PV.shape[-1]} tokens and the evaluated model {logits_PV.shape[-1]}",
                "give as --base the model that was quantized",
            )
    columns: dict[str, list[torch.Tensor]] = {}
    step = max(1, CHUNK_LOGITS // logits_PV.shape[-1])
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
    return Predictions(**{name: torch.cat(parts).cpu().numpy() for name, parts in columns.items()})


def divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) in nats along the last dimension."""
    p = log_p.exp()
    # A term's limit is 0 where p is 0: a model that masks tokens with -inf would give 0 times infinity.
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)


def _check_finite(values: Predictions, where: str) -> None:
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


def summarize(all_WP: Predictions, protocol: Protocol, bits_per_weight: float | None) -> EvaluationResult:
    """The figures of one model from all of its predictions."""
    perplexity, perplexity_stderr = _exp_mean(all_WP.surprisal)
    figures: dict[str, Any] = {}
    if all_WP.base_surprisal is not None:
        figures["base_perplexity"], _ = _exp_mean(all_WP.base_surprisal)
        ratio, ratio_stderr = _exp_mean(all_WP.surprisal - all_WP.base_surprisal)
        median, p99, p999 = np.quantile(all_WP.kl, (0.5, 0.99, 0.999))
        figures |= {
            "perplexity_ratio": ratio,
            "perplexity_ratio_stderr": ratio_stderr,
            "kl_mean": float(all_WP.kl.mean()),
            "kl_median": float(median),
            "kl_p99": float(p99),
            "kl_p999": float(p999),
            "kl_max": float(all_WP.kl.max()),
            "kl_stderr": standard_error(all_WP.kl),
            "top1_agreement": float(all_WP.agrees.mean()),
            "top1_stderr": standard_error(all_WP.agrees),
            "kl_histogram": histogram_of(all_WP.kl),
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
    error_of_mean = standard_error(surprisal_WP)
    return value, None if error_of_mean is None else value * error_of_mean


def standard_error(values_WP: np.ndarray) -> float | None:
    """Of the mean, with the windows' means as the independent observations."""
    means_W = values_WP.mean(axis=1)
    return None if len(means_W) < 2 else float(means_W.std(ddof=1) / math.sqrt(len(means_W)))
