"""Owns the two passes of a model that are timed: prefill of a prompt, and decoding tokens one by one with a static cache.

On a GPU both are replays of CUDA graphs: eager transformers spends longer starting kernels than they run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import StaticCache

from qtipcli.errors import QtipError
from qtipcli.stages.timing import captured

SEED = 1

CHECKED_TOKENS = 4
"""Tokens that a faster way must decode as the eager model does before it is timed."""

LARGEST_DIFFERENCE = 0.02
"""Most relative difference between the logits of a faster way and of the eager pass: the library may choose other kernels for
its products in a capture, compiled code rounds elsewhere, and sixteen bits do so in each of some hundred layers."""


class Prefill:
    """The pass over a whole prompt, without a cache; the head on the last position only, as generation does it.

    how: "eager", "CUDA graph", or "eager: " and why there is no graph. logits: [1, 1, vocabulary] of the last run.
    """

    def __init__(self, model: Any, length: int, graphs: bool) -> None:
        self.tokens = length
        self._model = model
        self._prompt = _random_prompt(model, length)
        self.how, self.run = "eager", self._pass
        self.run()
        _refuse_infinite(self.logits, model)
        if graphs:
            expected = self.logits.clone()
            self.run, reason = captured(self._pass)
            self.how = f"eager: no graph, {reason}" if reason else "CUDA graph"
            self.run()
            _refuse_difference(self.logits, expected)

    def _pass(self) -> None:
        self.logits = self._model(input_ids=self._prompt, use_cache=False, logits_to_keep=1).logits


class Decoder:
    """Greedy decoding of `steps` tokens after a prompt; `run` starts behind the prompt again each time.

    how: as of `Prefill`, with "compiled" for "eager" where the step goes through torch.compile(fullgraph=True), which takes
    minutes. logits: [1, vocabulary] of the last step.
    """

    def __init__(self, model: Any, prompt: int, steps: int, graphs: bool, compiled: bool = False) -> None:
        self.tokens = steps
        self._model = model
        self._cache = StaticCache(config=model.config, max_cache_len=prompt + steps)
        logits = model(input_ids=_random_prompt(model, prompt), past_key_values=self._cache, use_cache=True).logits
        self._token = logits[:, -1:].argmax(-1)
        self._start = (self._token.clone(), [(tensor, tensor.clone()) for tensor in self._tensors()], self._numbers())
        self.how, self._step = "eager", self._eager_step
        expected = self._first_logits()
        _refuse_infinite(expected, model)
        if compiled:
            self._model, self.how = torch.compile(model, fullgraph=True, dynamic=False), "compiled"
            _refuse_difference(self._first_logits(), expected)
        if graphs:
            self._step, reason = captured(self._eager_step)
            self.how = f"{self.how}: no graph, {reason}" if reason else f"CUDA graph{' of compiled code' if compiled else ''}"
            _refuse_difference(self._first_logits(), expected)

    def run(self) -> None:
        """Decode all tokens."""
        self._rewind()
        for _ in range(self.tokens):
            self._step()

    def _eager_step(self) -> None:
        self.logits = self._model(input_ids=self._token, past_key_values=self._cache, use_cache=True).logits[:, -1]
        self._token.copy_(self.logits.argmax(-1, keepdim=True))

    def _first_logits(self) -> torch.Tensor:
        """[CHECKED_TOKENS, vocabulary] after fixed tokens, so that a near tie between two tokens makes no difference."""
        self._rewind()
        found = []
        for token in range(min(CHECKED_TOKENS, self.tokens)):
            self._token.fill_(token)
            self._step()
            found.append(self.logits.clone())
        return torch.cat(found)

    def _rewind(self) -> None:
        """Put the cache back behind the prompt, in place: a graph knows its tensors by their addresses."""
        token, tensors, numbers = self._start
        self._token.copy_(token)
        for tensor, saved in tensors:
            tensor.copy_(saved)
        for layer, name, number in numbers:
            setattr(layer, name, number)

    def _tensors(self) -> list[torch.Tensor]:
        return [value for layer in self._cache.layers for value in vars(layer).values() if isinstance(value, torch.Tensor)]

    def _numbers(self) -> list[tuple[Any, str, int]]:
        return [
            (layer, name, value) for layer in self._cache.layers for name, value in vars(layer).items() if type(value) is int
        ]


def in_turns(
    passes: Sequence[Prefill] | Sequence[Decoder], seconds: float, device: torch.device, rounds: int = 3
) -> list[float]:
    """Tokens a second of each pass, the median of at least `rounds` turns; one more goes before and is not counted."""
    times: list[list[float]] = [[] for _ in passes]
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(times[-1]) <= rounds:
        for each, spent in zip(passes, times, strict=True):
            spent.append(_seconds(each.run, device))
    return [each.tokens / statistics.median(spent[1:]) for each, spent in zip(passes, times, strict=True)]


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _random_prompt(model: Any, length: int) -> torch.Tensor:
    vocabulary = model.config.get_text_config().vocab_size
    tokens = torch.randint(0, vocabulary, (1, length), generator=torch.Generator().manual_seed(SEED))
    return tokens.to(model.device)


def _refuse_infinite(logits: torch.Tensor, model: Any) -> None:
    if not torch.isfinite(logits).all():
        raise QtipError(f"{type(model).__name__} gives NaN or infinite logits: no speed is given", "see qtip eval")


def _refuse_difference(found: torch.Tensor, expected: torch.Tensor) -> None:
    difference = float((found.float() - expected.float()).norm() / expected.float().norm())
    if not difference <= LARGEST_DIFFERENCE:
        raise QtipError(
            f"logits of the faster way differ by {difference:.3g} from the eager model's: no speed is given",
            "report this as a bug",
        )
