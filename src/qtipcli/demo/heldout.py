"""Owns the demo model's held-out figure: bits per byte of text it has never seen, beside a 3-gram byte model's."""

import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qtipcli.demo.ngram import ByteTrigram
from qtipcli.demo.text import evaluation_text, training_text
from qtipcli.demo.tokenizer import END_OF_TEXT_ID

WINDOWS_PER_BATCH = 8


@torch.no_grad()
def heldout_loss(model: torch.nn.Module, token_N: torch.Tensor) -> float:
    """Mean negative log-likelihood of the tokens, in nats per token.

    token_N: int64 [N]. Protocol: windows of the model's full context that do not overlap; a window begins with the token before
    it (the first with end-of-text), so every token is predicted exactly once, from at most `context` tokens before it.
    """
    context = model.config.max_position_embeddings
    token_N = torch.cat([torch.tensor([END_OF_TEXT_ID]), token_N])
    batches = list(_batches(token_N, context))
    total = 0.0
    for batch_BT in batches:
        logits_BTV = model(input_ids=batch_BT[:, :-1], use_cache=False).logits.float()
        total += torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), batch_BT[:, 1:].flatten(), reduction="sum").item()
    return total / (len(token_N) - 1)


def _batches(token_N: torch.Tensor, context: int):
    window_WT = token_N.unfold(0, context + 1, context) if len(token_N) > context else token_N.new_empty(0, context + 1)
    yield from window_WT.split(WINDOWS_PER_BATCH) if len(window_WT) else ()
    rest_T = token_N[len(window_WT) * context :]
    if len(rest_T) > 1:
        yield rest_T[None]


def bits_per_byte(nats_per_token: float, tokens: int, text: str) -> float:
    """A loss per token as a loss per byte of the UTF-8 text, which no longer depends on the tokenizer."""
    return nats_per_token * tokens / math.log(2) / len(text.encode())


def evaluate(directory: Path) -> dict[str, float]:
    """The demo model in `directory` on the evaluation text, beside the 3-gram byte model of the same training text."""
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True, dtype=torch.float32).eval()
    text = evaluation_text()
    token_N = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    nats_per_token = heldout_loss(model, token_N)
    bits = bits_per_byte(nats_per_token, len(token_N), text)
    trigram_bits = ByteTrigram.fit(training_text().encode()).bits_per_byte(text.encode())
    return {
        "bits_per_byte": bits,
        "trigram_bits_per_byte": trigram_bits,
        "ratio": bits / trigram_bits,
        "perplexity": math.exp(nats_per_token),
        "tokens": len(token_N),
        "bytes": len(text.encode()),
    }
