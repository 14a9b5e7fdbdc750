"""Owns a conversation: what was said so far, and the model that answers it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from qtipcli.stages.generate import Generated, Generator, Stop
from qtipcli.stages.sampling import Sampling


class Conversation:
    """One model in memory and the turns so far.

    system: instructions that every conversation begins with. Raises QtipError where the model has no chat template.
    """

    def __init__(self, directory: str | Path, sampling: Sampling, system: str | None = None) -> None:
        self._generator = Generator(directory)
        self._sampling = sampling
        self._first = [{"role": "system", "content": system}] if system else []
        self.turns: list[dict[str, str]] = []
        self._generator.chat_prompt([*self._first, {"role": "user", "content": "?"}])
        torch.manual_seed(sampling.seed)

    def clear(self) -> None:
        """Forget what was said, the instructions excepted."""
        self.turns = []

    def reply(self, text: str, on_text: Callable[[str], None], stop: Stop | None = None) -> Generated:
        """The model's answer to `text`, which becomes part of the conversation, as far as it came where `stop` was asked for.

        Raises QtipError where the conversation leaves no room in the model's context; then `text` is not part of it.
        """
        asked = [*self.turns, {"role": "user", "content": text}]
        prompt = self._generator.chat_prompt([*self._first, *asked])
        answer = self._generator.answer(prompt, self._sampling, on_text, is_templated=True, stop=stop)
        self.turns = [*asked, {"role": "assistant", "content": answer.text}]
        return answer
