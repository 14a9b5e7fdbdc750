"""A tokenizer made in memory: one token a character, <s> in front of a text, </s> as the end."""

from __future__ import annotations

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

ALPHABET = "abcdefghijklmnopqrstuvwxyz \n"
BOS, EOS, UNKNOWN = 0, 1, 2
FIRST_LETTER = 3
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'robot' %}{{ raise_exception('no robots') }}{% endif %}"
    "{{ m.role }} {{ m.content }}{{ eos_token }}{% endfor %}"
)


def letters(text: str) -> list[int]:
    """The oracle: tokens by counting through the alphabet."""
    return [FIRST_LETTER + ALPHABET.index(letter) for letter in text]


def make_tokenizer(adds_bos: bool = True, has_eos: bool = True) -> PreTrainedTokenizerFast:
    vocabulary = {"<s>": BOS, "</s>": EOS, "<unk>": UNKNOWN} | {c: FIRST_LETTER + i for i, c in enumerate(ALPHABET)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>" if adds_bos else None,
        eos_token="</s>" if has_eos else None,
        unk_token="<unk>",
        model_max_length=8,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()
