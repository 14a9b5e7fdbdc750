"""Owns text generation, from packed weights or plain ones: streamed, stopped at strings or by the user, with its speed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, StoppingCriteria

from qtipcli.errors import QtipError
from qtipcli.stages.load import load_model, load_tokenizer
from qtipcli.stages.sampling import Sampling

UNFINISHED = "\ufffd"
"""What a tokenizer decodes the first bytes of a character to."""


@dataclass(frozen=True)
class Generated:
    """One answer and what it took.

    prompt: what it was given, as the model saw it. text: what it added. prompt_tokens, tokens: of each. ended: "eos", "stop",
    "length" or "interrupted". seconds_to_first: until the first token, in which the prompt is read. tokens_per_s: of the tokens
    after the first; of all where there is one.
    """

    prompt: str
    text: str
    prompt_tokens: int
    tokens: int
    ended: str
    seconds_to_first: float
    tokens_per_s: float

    def speed(self) -> str:
        """One line for a person."""
        return f"{self.tokens} tokens, {self.tokens_per_s:.1f} tokens/s, the first after {self.seconds_to_first:.2f} s"


@dataclass
class Stop:
    """Set `asked` to end an answer at its next token, from a signal handler or another thread."""

    asked: bool = False


class Generator:
    """A loaded model and its tokenizer. Keeps the keys and values of the last answer, for a next prompt that begins like it.

    Raises QtipError where either cannot be loaded.
    """

    def __init__(self, directory: str | Path) -> None:
        self.name = str(directory)
        self.model = load_model(directory)
        self.tokenizer = load_tokenizer(directory)
        self._cache: Any = None
        self._cached: list[int] = []

    @property
    def context(self) -> int | None:
        """Most tokens that the model was made for, None where its config does not say."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def chat_prompt(self, messages: list[dict[str, str]]) -> str:
        """The text of a conversation up to where the model is to answer. messages: {"role", "content"} each.

        Raises QtipError where the model has no chat template, or its template refuses the messages.
        """
        if not self.tokenizer.chat_template:
            raise QtipError(
                f"{self.name} has no chat template: it goes on from text and was not made to chat",
                f"qtip generate {self.name} --prompt TEXT",
            )
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        # Templates raise jinja2's own error, which is not ours to import.
        except Exception as error:
            raise QtipError(f"the chat template of {self.name} refuses the conversation: {error}") from error

    def answer(
        self,
        prompt: str,
        sampling: Sampling,
        on_text: Callable[[str], None] = lambda text: None,
        is_templated: bool = False,
        stop: Stop | None = None,
    ) -> Generated:
        """What the model adds to `prompt`; on_text is given each piece of it as it comes.

        is_templated: the prompt comes from `chat_prompt`, special tokens and all. Draws from torch's global generator.
        Raises QtipError where the prompt is empty, or leaves no room in the model's context.
        """
        encoded = self.tokenizer(
            prompt, return_tensors="pt", return_token_type_ids=False, add_special_tokens=not is_templated
        ).to(self.model.device)
        given = encoded["input_ids"].shape[1]
        tokens = self._room(given, sampling.tokens)
        kept = self._cache_for(encoded["input_ids"][0].tolist())
        watch = _Watch(self.tokenizer, given, sampling.stop, on_text, stop or Stop())
        started = time.monotonic()
        with torch.no_grad():
            output = self.model.generate(
                **encoded,
                **kept,
                max_new_tokens=tokens,
                return_dict_in_generate=True,
                stopping_criteria=[watch],
                pad_token_id=_padding(self.tokenizer),
                **sampling.arguments(self.model.generation_config),
            )
        ended = time.monotonic()
        watch.finish()
        self._keep(output)
        sequence = output.sequences[0]
        new = len(sequence) - given
        after_first = ended - watch.first_at
        return Generated(
            prompt=prompt,
            text=watch.text,
            prompt_tokens=given,
            tokens=new,
            ended=watch.reason or ("length" if new >= tokens and not _is_end(self.model, sequence[-1]) else "eos"),
            seconds_to_first=watch.first_at - started,
            tokens_per_s=(new - 1) / after_first if new > 1 else new / (ended - started),
        )

    def _room(self, given: int, asked: int) -> int:
        if not given:
            raise QtipError("the prompt is empty", "give --prompt TEXT")
        if self.context is None:
            return asked
        if given >= self.context:
            raise QtipError(
                f"{given} tokens leave no room for an answer in the {self.context} of {self.name}", "shorten the prompt"
            )
        return min(asked, self.context - given)

    def _cache_for(self, ids: list[int]) -> dict[str, Any]:
        """The last answer's keys and values, as an argument, where the prompt begins with their tokens; they are taken out."""
        cache, self._cache = self._cache, None
        # At least one token must be left to compute.
        is_beginning = len(self._cached) < len(ids) and ids[: len(self._cached)] == self._cached
        return {"past_key_values": cache} if cache is not None and is_beginning else {}

    def _keep(self, output: Any) -> None:
        cache = getattr(output, "past_key_values", None)
        # Other kinds, of models with a state of another shape, cannot all be gone on from.
        if isinstance(cache, DynamicCache):
            self._cache, self._cached = cache, output.sequences[0].tolist()[: cache.get_seq_length()]


@dataclass(eq=False)
class _Watch(StoppingCriteria):
    """Called by transformers after each token: decodes what is new, passes it on, and says when to stop.

    Text that may be the beginning of a stop string or of a character is held back until the next token decides.
    """

    tokenizer: Any
    seen: int
    stops: tuple[str, ...]
    on_text: Callable[[str], None]
    stop: Stop
    text: str = ""
    reason: str = ""
    first_at: float = 0.0
    _pending: list[int] = field(default_factory=list)
    _before: str = ""
    _shown: int = 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
        new = input_ids[0, self.seen :].tolist()
        self.first_at = self.first_at or time.monotonic()
        self.seen += len(new)
        self._take(new)
        if self.stop.asked and not self.reason:
            self.reason = "interrupted"
        return torch.full((len(input_ids),), bool(self.reason), device=input_ids.device)

    def finish(self) -> None:
        """Pass on what was held back."""
        self._show(len(self.text))

    def _take(self, new: list[int]) -> None:
        self._pending += new
        decoded = self.tokenizer.decode(self._pending, skip_special_tokens=True)
        self.text = self._before + decoded
        # From a line's end on, decoding starts anew: decoding all of a long answer for each token would take longer and longer.
        if decoded.endswith("\n"):
            self._before, self._pending = self.text, []
        found = [place for string in self.stops if (place := self.text.find(string)) >= 0]
        if found:
            self.text, self.reason = self.text[: min(found)], "stop"
            self._show(len(self.text))
        elif not decoded.endswith(UNFINISHED):
            self._show(len(self.text) - max((_overlap(self.text, string) for string in self.stops), default=0))

    def _show(self, end: int) -> None:
        if end > self._shown:
            piece, self._shown = self.text[self._shown : end], end
            self.on_text(piece)


def _overlap(text: str, string: str) -> int:
    """Length of the longest end of `text` that `string` begins with."""
    return next((size for size in range(min(len(string), len(text)), 0, -1) if text.endswith(string[:size])), 0)


def _padding(tokenizer: Any) -> int:
    """Any token: there is one sequence, and nothing to pad. transformers warns where there is none."""
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)


def _is_end(model: Any, token: torch.Tensor) -> bool:
    ends = model.generation_config.eos_token_id
    return token.item() in (ends if isinstance(ends, list) else [ends])


def run(
    directory: str | Path,
    prompt: str,
    sampling: Sampling,
    on_text: Callable[[str], None] | None = None,
    chat: bool = False,
    system: str | None = None,
    stop: Stop | None = None,
) -> Generated:
    """Continue `prompt`, or with `chat` answer it by the model's chat template. system: instructions before it, with `chat`.

    on_text is given the prompt (without `chat`), then each piece. Raises QtipError.
    """
    generator = Generator(directory)
    text = generator.chat_prompt(messages(prompt, system)) if chat else prompt
    torch.manual_seed(sampling.seed)
    if on_text and not chat:
        on_text(prompt)
    return generator.answer(text, sampling, on_text or (lambda piece: None), is_templated=chat, stop=stop)


def messages(prompt: str, system: str | None) -> list[dict[str, str]]:
    """A conversation of one question, with instructions before it where there are any."""
    before = [{"role": "system", "content": system}] if system else []
    return [*before, {"role": "user", "content": prompt}]
