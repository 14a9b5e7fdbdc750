"""Owns text generation from a prompt, packed or plain, with the speed it had."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, TextStreamer

from qtipcli.errors import QtipError, SettingsError
from qtipcli.stages.load import load_model


@dataclass(frozen=True)
class Generated:
    """prompt and its continuation, tokens: new ones, tokens_per_s: of them, prompt included in the time."""

    prompt: str
    text: str
    tokens: int
    tokens_per_s: float


class _CallbackStreamer(TextStreamer):
    def __init__(self, tokenizer, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._on_text(text)


def run(
    directory: str | Path,
    prompt: str,
    tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    on_text: Callable[[str], None] | None = None,
) -> Generated:
    """Continue `prompt` by up to `tokens` tokens; temperature 0 is greedy. on_text is given the prompt, then each piece."""
    if tokens < 1:
        raise SettingsError(f"{tokens} tokens cannot be generated", "ask for 1 or more")
    if temperature < 0:
        raise SettingsError(f"temperature {temperature:g} is negative", "0 is greedy, 1 samples from the model as it is")
    model = load_model(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    if not inputs["input_ids"].shape[1]:
        raise QtipError("the prompt is empty", "give --prompt TEXT")
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    streamer = _CallbackStreamer(tokenizer, on_text) if on_text else None
    if on_text:
        on_text(prompt)
    started = time.monotonic()
    with torch.no_grad():
        output = model.generate(
            **inputs, max_new_tokens=tokens, streamer=streamer, pad_token_id=tokenizer.eos_token_id, **sampling
        )
    seconds = time.monotonic() - started
    new = output[0, inputs["input_ids"].shape[1] :]
    return Generated(prompt, tokenizer.decode(new, skip_special_tokens=True), len(new), len(new) / seconds)
