"""Owns Sampling: how the next token is chosen and when an answer ends, checked before a model is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qtipcli.errors import SettingsError


@dataclass(frozen=True)
class Sampling:
    """What a person chooses of text generation. None leaves it to the model's generation_config.json, else to no effect.

    tokens: new ones at most. temperature: 0 is greedy, 1 the model as it is. top_p: the share of probability that is kept,
    top_k: the number of tokens that are (0 keeps all). repetition_penalty: above 1 makes what was said less likely.
    seed: of the draws. stop: strings at which the answer ends, without them.
    Raises SettingsError for a value outside of its range.
    """

    tokens: int = 128
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise SettingsError(f"{self.tokens} tokens cannot be generated", "ask for 1 or more")
        if self.temperature is not None and not self.temperature >= 0:
            raise SettingsError(f"temperature {self.temperature:g} is negative", "0 is greedy, 1 the model as it is")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise SettingsError(f"top-p {self.top_p:g} is no share of probability", "choose above 0 and at most 1")
        if self.top_k is not None and self.top_k < 0:
            raise SettingsError(f"top-k {self.top_k} is negative", "0 keeps all tokens")
        if self.repetition_penalty is not None and not self.repetition_penalty > 0:
            raise SettingsError(f"repetition penalty {self.repetition_penalty:g} is not positive", "1 is none, 1.1 is usual")
        if "" in self.stop:
            raise SettingsError("an empty stop string ends every answer at once", "leave it out")

    def arguments(self, own: Any) -> dict[str, Any]:
        """Keyword arguments of transformers' generate. own: the model's GenerationConfig, for what was not chosen."""
        temperature = self.temperature
        if temperature is None:
            temperature = (own.temperature or 1.0) if own.do_sample else 0.0
        chosen: dict[str, Any] = {
            "do_sample": temperature > 0,
            "repetition_penalty": _first(self.repetition_penalty, own.repetition_penalty, 1.0),
        }
        if not temperature:
            return chosen | dict.fromkeys(("temperature", "top_p", "top_k"))
        # Said even where it has no effect: transformers' own default is to keep 50 tokens.
        return chosen | {
            "temperature": temperature,
            "top_p": _first(self.top_p, own.top_p, 1.0),
            "top_k": _first(self.top_k, own.top_k, 0),
        }


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)
